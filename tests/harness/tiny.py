"""One two-layer model per family, with the trait that broke somebody's tensor parallelism.

Owns: configurations, deterministic non-trivial weights.
Must not know: parallel models, process groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    CohereConfig,
    DeepseekV3Config,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
)

from hf_sp.proof.reference import float64_loss
from hf_sp.proof.report import IN_FLOAT32

_BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

# The auxiliary loss is about 2 here and the loss about 5: at 0.5 its gradient is of the same size.
_SPARSE = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5}
# 12 features a rank at tp = 4: 96 bytes in float64, 24 in bfloat16, which no grouped GEMM takes.
_SMALL_EXPERTS = {"num_experts": 8, "moe_intermediate_size": 48}

_DELTA_NET = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}

# name -> (configuration class, what differs from _BASE). The comment is the trait.
FAMILIES: Mapping[str, tuple[type, dict[str, Any]]] = MappingProxyType(
    {
        # grouped-query attention: two query heads per kv head
        "llama": (LlamaConfig, {}),
        # biases everywhere; a padding row, whose embedding gradient HF leaves at zero
        "llama_bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True, "pad_token_id": 0}),
        # one tensor is both embedding and head: its gradient is a sum of two
        "llama_tied": (LlamaConfig, {"tie_word_embeddings": True}),
        # 61 rows: no tp divides them, and the padding row sits in the last shard
        "llama_odd_vocab": (LlamaConfig, {"vocab_size": 61, "pad_token_id": 60}),
        "llama_mha": (LlamaConfig, {"num_key_value_heads": 8}),
        # fewer kv heads than ranks: each is computed on several
        "llama_kv1": (LlamaConfig, {"num_key_value_heads": 1}),
        "llama_kv2": (LlamaConfig, {"num_key_value_heads": 2}),
        # a window shorter than every sequence of the tests but the shortest
        "mistral": (MistralConfig, {"sliding_window": 5, "head_dim": 8}),
        # bias on q, k, v only
        "qwen2": (Qwen2Config, {}),
        # q_norm and k_norm see the local heads only; heads * head_dim is twice the hidden size
        "qwen3": (Qwen3Config, {"head_dim": 16}),
        "qwen3_tied": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    }
)
# Outside the matrix, for one trait each: what the model does to its logits.
RELATIVES: Mapping[str, tuple[type, dict[str, Any]]] = MappingProxyType(
    {
        # divides logits (and scales residuals and embeddings)
        "granite": (
            GraniteConfig,
            {"logits_scaling": 0.25, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
        ),
        # multiplies logits; one norm and two blocks side by side
        "cohere": (CohereConfig, {"logit_scale": 0.5, "pad_token_id": None}),
        # caps logits and attention scores; a scaled embedding
        "gemma2": (
            Gemma2Config,
            {
                "head_dim": 8,
                "query_pre_attn_scalar": 8,
                "sliding_window": 5,
                "final_logit_softcapping": 1.5,
                "hidden_activation": "gelu_pytorch_tanh",
            },
        ),
        # Gemma 2's forward around the head on a model that takes padded batches: Gemma's attention
        # makes NaN of rows that see nothing
        "llama_capped": (LlamaConfig, {"final_logit_softcapping": 1.5}),
    }
)
# One for each mechanism that plans have besides column and row linears.
MECHANISMS: Mapping[str, tuple[type, dict[str, Any]]] = MappingProxyType(
    {
        # q, k and v in one linear, gate and up in another
        "phi3": (Phi3Config, {"pad_token_id": None}),
        "phi3_mha": (Phi3Config, {"pad_token_id": None, "num_key_value_heads": 8}),
        # norms behind the exits of both blocks; biases on q, k and v alone
        "glm4": (Glm4Config, {"head_dim": 8, "pad_token_id": None, "attention_bias": True}),
        # a scaled embedding, sandwich norms, norms of heads, a layer with a window
        "gemma3": (
            Gemma3TextConfig,
            {
                "head_dim": 16,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        # norms over all heads of q and of k
        "olmo2": (Olmo2Config, {"pad_token_id": None}),
        # q, k and v in one linear by head; what is called attention has no attribute head_dim
        "gpt_neox": (GPTNeoXConfig, {"pad_token_id": None}),
        # Gated DeltaNet, two value heads to a key head; an attention whose heads have gates
        "qwen3_5": (Qwen3_5TextConfig, _DELTA_NET),
        # its q, k, v and z in one linear by head; a shared expert
        "qwen3_next": (
            Qwen3NextConfig,
            {**_DELTA_NET, **_SPARSE, **_SMALL_EXPERTS, "shared_expert_intermediate_size": 40},
        ),
        # two sizes of heads, keys that are values, layers with keys of layers before, an argument
        # of the layers by token, experts that the layer owns, beside its MLP
        "gemma4": (
            Gemma4TextConfig,
            {
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "head_dim": 16,
                "global_head_dim": 32,
                "num_global_key_value_heads": 2,
                "attention_k_eq_v": True,
                "num_kv_shared_layers": 2,
                "sliding_window": 5,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 96,
                "enable_moe_block": True,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 48,
                "pad_token_id": None,
            },
        ),
        # sinks, a number for each head; biases everywhere, of experts and their router too; gate
        # and up of an expert alternate, and are clamped; a layer with a window
        "gpt_oss": (
            GptOssConfig,
            {
                "head_dim": 8,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "sliding_window": 5,
                "attention_bias": True,
                "pad_token_id": None,
                # Both clamps are met.
                "swiglu_limit": 1.0,
            },
        ),
        # dropout behind the row linears, inside of both blocks
        "seed_oss": (
            SeedOssConfig,
            {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0},
        ),
        # Mamba-2: two heads to a group, which share the state's inputs and outputs
        "bamba": (
            BambaConfig,
            {
                "attn_layer_indices": [1],
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_d_state": 8,
                "mamba_n_groups": 4,
                "pad_token_id": None,
            },
        ),
        # the same beside an attention in each layer, one group for all, whose norm is before the
        # gate; what is projected has multipliers
        "falcon_h1": (
            FalconH1Config,
            {
                "mamba_d_ssm": 128,
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_d_state": 8,
                "mamba_rms_norm": True,
                "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9],
                "ssm_in_multiplier": 1.25,
                "pad_token_id": None,
            },
        ),
        # the same in turn with an attention that is given no positions; a dense MLP by another name
        "granite_hybrid": (
            GraniteMoeHybridConfig,
            {
                "layer_types": ["linear_attention", "full_attention"],
                "mamba_n_heads": 8,
                "mamba_d_head": 16,
                "mamba_d_state": 8,
                "mamba_n_groups": 1,
                "shared_intermediate_size": 96,
                "num_local_experts": 0,
                "num_experts_per_tok": 0,
                "attention_multiplier": 0.35,
                "residual_multiplier": 0.8,
            },
        ),
        # layers of one block each: a Mamba-2, an MLP, an attention without positions
        "nemotron_h": (
            NemotronHConfig,
            {
                "num_hidden_layers": 3,
                "layers_block_type": ["linear_attention", "mlp", "full_attention"],
                "head_dim": 8,
                "mamba_num_heads": 8,
                "mamba_head_dim": 16,
                "ssm_state_size": 8,
                "n_groups": 4,
                "pad_token_id": None,
            },
        ),
        # low-rank projections that all heads share, a sigmoid router with groups and a correction
        "deepseek_v3": (
            DeepseekV3Config,
            {
                "num_key_value_heads": 8,
                "q_lora_rank": 24,
                "kv_lora_rank": 16,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "head_dim": 8,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "n_group": 2,
                "topk_group": 1,
                "n_shared_experts": 1,
                "moe_intermediate_size": 48,
                "first_k_dense_replace": 1,
                "pad_token_id": None,
            },
        ),
    }
)
# tests/parity/test_wide.py shows that nothing but transformers' casts is what these allow.
# Where transformers computes in float32 whatever the dtype, and a rank has a part of the numbers:
# norms over all heads (sums of squares), the weights of Gemma's norms, and routers, as
# tests/sparse/test_parity.py has it.
FLOAT32 = dict.fromkeys(("gemma3", "olmo2", "deepseek_v3"), IN_FLOAT32)
# Their scans are all float32, and make more of a rounding that falls otherwise.
_SCANS = "qwen3_5", "qwen3_next", "bamba", "falcon_h1", "granite_hybrid", "nemotron_h"
FLOAT32 |= dict.fromkeys(_SCANS, 1e-5)
# Twice the layers, a dozen such norms and a router in each.
FLOAT32["gemma4"] = 4e-6


class LlamaCapped(LlamaForCausalLM):
    """Logits as Gemma 2 makes them."""

    forward = Gemma2ForCausalLM.forward


# The same of mixtures of experts, with the auxiliary loss on.
SPARSE: Mapping[str, tuple[type, dict[str, Any]]] = MappingProxyType(
    {
        # experts in every layer; the router's softmax is float32 whatever the dtype
        "mixtral": (MixtralConfig, {**_SPARSE, "num_local_experts": 4}),
        # a shared expert with a gate; routing weights that do not sum to one
        "qwen2_moe": (
            Qwen2MoeConfig,
            {**_SPARSE, **_SMALL_EXPERTS, "shared_expert_intermediate_size": 40},
        ),
        # a dense layer and a sparse one
        "qwen3_moe": (
            Qwen3MoeConfig,
            {**_SPARSE, **_SMALL_EXPERTS, "head_dim": 16, "mlp_only_layers": [0]},
        ),
        # HF's own router, float32 in a float64 model; float64_router says what stands in elsewhere
        "mixtral_own_router": (MixtralConfig, {**_SPARSE, "num_local_experts": 4}),
        "qwen3_moe_own_router": (Qwen3MoeConfig, {**_SPARSE, **_SMALL_EXPERTS, "head_dim": 16}),
    }
)


def config(family: str, **overrides: Any):
    """The family's configuration. `overrides` are configuration fields."""
    cls, fields = {**FAMILIES, **RELATIVES, **MECHANISMS, **SPARSE}[family]
    return cls(**{**_BASE, **fields, **overrides})


def build(
    family: str,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attn: str = "sdpa",
    **overrides: Any,
) -> PreTrainedModel:
    """A model whose weights depend on family and seed only, not on the RNG; dtype rounds them.

    HF starts norms at one, biases at zero, and matrices so small (0.02) that attention is nearly
    uniform: dropped biases, dropped norm weights and wrong masks would hardly show. Here norms
    scatter around one, biases are not zero, and matrices keep activations near unit size.
    """
    with torch.random.fork_rng(devices=[]):
        # from_config, not .to(dtype): `.to(bfloat16)` would round RoPE's inv_freq, which HF keeps
        # in float32.
        make = LlamaCapped._from_config if family == "llama_capped" else None
        model = (make or AutoModelForCausalLM.from_config)(
            config(family, **overrides), dtype=dtype, attn_implementation=attn
        )
    if family in SPARSE or family in MECHANISMS:
        # HF's grouped forward takes no float64; this is the definition.
        model.set_experts_implementation("eager")
        if family in SPARSE and dtype == torch.float64 and not family.endswith("_own_router"):
            for layer in model.model.layers:
                if hasattr(layer.mlp, "gate"):
                    layer.mlp.gate.forward = MethodType(float64_router, layer.mlp.gate)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Some routers are made in float32, and would round each step.
            parameter.data = parameter.to(dtype)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(_initial(name, noise))
    return model.train()


def _initial(name: str, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith(("norm.weight", "scale")):
        return 1 + 0.2 * noise
    if name.endswith("bias") or noise.dim() == 1:
        return 0.2 * noise
    if "embed_tokens" in name:
        return 0.5 * noise
    # Experts' weights have the number of experts before the output features.
    return noise / noise.shape[-1 if noise.dim() == 3 else 1] ** 0.5


def float64_router(
    router: torch.nn.Module, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """HF's routers without their float32.

    They compute the softmax and its backward in float32 whatever the dtype. The parallel model's
    ranks hold parts of the gradient that comes in there: the sum of the rounded parts is not the
    rounded sum, by 2^-24 of it, and no float64 model can show whether the rest is exact.
    """
    logits = functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
    values, indices = torch.topk(logits.softmax(-1), router.top_k, dim=-1)
    # Mixtral's has no such switch: always.
    if getattr(router, "norm_topk_prob", True):
        values = values / values.sum(-1, keepdim=True)
    return logits, values, indices


def reference(model: PreTrainedModel) -> PreTrainedModel:
    """Mark an unsharded model as the judge.

    Float64 models get the float64 loss. Returns the model.
    """
    if model.dtype == torch.float64:
        model.loss_function = float64_loss
    return model
