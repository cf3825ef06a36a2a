"""A tiny model of every causal LM class of the installed transformers, from its config class.

Owns: which families there are, small values of their configs, weights. Must not know: hf_sp, ranks.
A family that the small values do not suit has a row in ODD; nothing here is code of one family.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
)
from transformers.models.auto import modeling_auto

# Set where a config has the name.
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "sliding_window": 5,
    # Mixtures of experts: a dense layer and a sparse one, where a family has both.
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "num_dense_layers": 1,
    "n_group": 2,
    "topk_group": 1,
    # Latent attention.
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 4,
    "index_n_heads": 4,
    "index_head_dim": 16,
    # Linear attention.
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    # State-space models.
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 4,
}

# family -> what its config is given besides or instead.
# There it is the size of the rotary part, and each query head has a key and a value.
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_LATENT = {"head_dim": 8, "num_key_value_heads": 8}
ODD: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm_moe_dsa": _LATENT,
    "dots3_note_text": {"num_key_value_heads": 8},
    "dots1": {"n_shared_experts": 1},
    # Layers of both kinds, of which the last two use the keys and values of the first two.
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "attention_k_eq_v": True,
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "use_double_wide_mlp": True,
    },
    "glm4_moe": {"use_qk_norm": True},
    "glm4_moe_lite": _LATENT,
    # A group of heads for all ranks; a multiplier of each of what is projected.
    "falcon_h1": {
        "mamba_d_ssm": 128,
        "mamba_n_groups": 1,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9],
        "ssm_in_multiplier": 1.25,
        "key_multiplier": 0.8,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_groups": 1,
        "position_embedding_type": "rope",
    },
    "gptj": {"rotary_dim": 4},
    "helium": {"head_dim": 8},
    # Layers of both kinds have other numbers of keys, and wider values.
    "mimo_v2_flash": {"num_key_value_heads": 2, "v_head_dim": 24},
    "minicpm3": _LATENT,
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention"]},
    "olmo_hybrid": _HYBRID,
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "sarvam_mla": _LATENT,
    "seed_oss": {"residual_dropout": 0.0},
    "youtu": _LATENT,
}
# What a model is given but for what it is judged by.
INPUTS = {
    "input_ids",
    "attention_mask",
    "pixel_values",
    "image_grid_thw",
    "image_position_ids",
    "image_sizes",
    "mm_token_type_ids",
    "token_type_ids",
}
# Their own attention makes nan of rows that see nothing.
RIGHT_PADDED = {"gemma2", "granite_swa", "granitemoe_swa", "paligemma", "vaultgemma"}


def families() -> list[str]:
    """Model types of all causal LM classes; not of what wraps one with other models (vision)."""
    names = sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return [name for name in names if not CONFIG_MAPPING[name].sub_configs]


# What else is made of a decoder: class, the names of its families, numbers of its config.
HEADS: dict[str, tuple[Any, dict[str, str]]] = {
    "sequence classification": (
        AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token classification": (
        AutoModelForTokenClassification,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "question answering": (
        AutoModelForQuestionAnswering,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
}


def with_head(head: str) -> list[str]:
    """Names of causal LM families that have a class with that head: ``llama, token ...``."""
    return [f"{name}, {head}" for name in families() if name in HEADS[head][1]]


def config(family: str) -> PretrainedConfig:
    """A small config of a family."""
    cls = CONFIG_MAPPING[family]
    names = {*inspect.signature(cls.__init__).parameters, *vars(cls()), *cls.attribute_map}
    odd = ODD.get(family, {})
    values = {name: value for name, value in SMALL.items() if name in names and name not in odd}
    return cls(**values, **odd)


def default_config(family: str) -> PretrainedConfig:
    """The config that a family's class makes by itself."""
    return CONFIG_MAPPING[family]()


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model whose weights depend on the family and the seed alone.

    A causal LM, or what ``with_head`` names.

    Transformers starts norms at one, biases at zero and matrices so small that attention is nearly
    uniform: a fault in those would hardly show.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        family, _, head = family.partition(", ")
        made = copy.deepcopy(config(family))
        if head:
            # A row is judged by its last token that is none of these.
            made.num_labels, made.get_text_config().pad_token_id = 3, 0
            # Ranks agree on a stream of their own for it: other masks than one process has.
            made.classifier_dropout = 0.0
        cls = HEADS[head][0] if head else AutoModelForCausalLM
        model = cls.from_config(made, dtype=dtype)
    return fill(model, seed)


def fill(model: Any, seed: int = 0) -> Any:
    """Give a model weights by which faults show."""
    # HF's grouped forward takes no float64; this is the definition.
    model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.dim() > 1:
                embeds = tensor.shape[0] == model.config.get_text_config().vocab_size
                tensor.copy_(noise * (0.5 if embeds else tensor.shape[-1] ** -0.5))
            elif isinstance(tensor, torch.nn.Parameter) or "bias" in name:
                tensor.add_(0.2 * noise)
    return model


def batches(
    vocab: int, left: bool, generator: torch.Generator | None = None, head: str = ""
) -> list[dict[str, torch.Tensor]]:
    """Of two steps: padded and odd, even and whole; with the labels of a head."""
    generator = generator or torch.Generator().manual_seed(0)
    made = []
    for length, pads in ((13, (4, 0)), (16, (0, 0))):
        ids = torch.randint(3, vocab, (2, length), generator=generator)
        mask = torch.arange(length)[None] >= torch.tensor(pads)[:, None]
        mask = mask if left else mask.flip(1)
        labels = ids.masked_fill(~mask, -100)
        batch = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
        if head == "question answering":
            batch |= {
                "start_positions": torch.tensor([5, 3]),
                "end_positions": torch.tensor([7, 4]),
            }
        else:
            labels = labels[:, 6] if head == "sequence classification" else labels
            batch["labels"] = labels.where(labels < 0, labels % 3) if head else labels
        made.append(batch)
    return made
