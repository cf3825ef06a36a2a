"""Plans of our own, as data: what transformers' plan of a family lacks, or says otherwise.

Keys are those of ``base_model_tp_plan``, and styles are transformers' own strings, with one more:
``colwise_by_head``, a linear whose rows are grouped by head (each head's q, k and v together).
Where transformers gathers a linear's output (``colwise_gather_output``), the module behind it runs
on this rank's features instead. A key that matches no module of a version is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hf_sp.plan.outer import inside

Rows = Mapping[str, str]

_ATTENTION: Rows = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}
_MLP: Rows = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# gate and up in one linear.
_PACKED_MLP: Rows = {
    "layers.*.mlp.gate_up_proj": "packed_colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# Norms of each head's features, which HF's plan forgets where a config has them.
_HEAD_NORMS: Rows = {
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
}
# Norms over all heads together: their weight is split, and so is their sum of squares.
_NORMS_OVER_HEADS: Rows = {
    **_ATTENTION,
    "layers.*.self_attn.q_norm": "colwise",
    "layers.*.self_attn.k_norm": "colwise",
}
# Low-rank projections and their norms are replicated, and used on own heads.
_LATENT_ATTENTION: Rows = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_a_proj": "mla_kv_a_proj",
    "layers.*.self_attn.q_a_layernorm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_a_layernorm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}

_SHARED_EXPERTS: Rows = {
    "layers.*.mlp.shared_experts.gate_proj": "colwise",
    "layers.*.mlp.shared_experts.up_proj": "colwise",
    "layers.*.mlp.shared_experts.down_proj": "rowwise",
}

_HUNYUAN: Rows = {
    **_ATTENTION,
    **_MLP,
    "layers.*.self_attn.query_layernorm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.key_layernorm": "replicated_with_grad_allreduce",
}
# Chooses keys for all heads, without a gradient.
_INDEXER: Rows = {"layers.*.self_attn.indexer": "replicate"}

# An activation with numbers of its own, applied to own features.
_ACTIVATION: Rows = {"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}
# Gated DeltaNet; each head's query in the attention has a gate beside it.
_DELTA_NET: Rows = {
    "layers.*.self_attn.q_proj": "colwise_by_head",
    "layers.*.linear_attn.in_proj_qkv": "packed_colwise",
    "layers.*.linear_attn.in_proj_z": "colwise",
    "layers.*.linear_attn.in_proj_b": "colwise",
    "layers.*.linear_attn.in_proj_a": "colwise",
    "layers.*.linear_attn.in_proj_qkvz": "colwise_by_head",
    "layers.*.linear_attn.in_proj_ba": "colwise_by_head",
    "layers.*.linear_attn.conv1d": "packed_colwise",
    "layers.*.linear_attn.A_log": "colwise",
    "layers.*.linear_attn.dt_bias": "colwise",
    "layers.*.linear_attn.norm": "replicated_with_grad_allreduce",
    "layers.*.linear_attn.out_proj": "rowwise",
}
# A state-space model whose heads share the state's inputs and outputs by groups.
_MAMBA_2: Rows = {
    "layers.*.mamba.in_proj": "packed_colwise",
    "layers.*.mamba.conv1d": "packed_colwise",
    "layers.*.mamba.A_log": "colwise",
    "layers.*.mamba.D": "colwise",
    "layers.*.mamba.dt_bias": "colwise",
    "layers.*.mamba.norm": "colwise",
    "layers.*.mamba.out_proj": "rowwise",
}
_FEED_FORWARD: Rows = {
    "layers.*.feed_forward.gate_proj": "colwise",
    "layers.*.feed_forward.up_proj": "colwise",
    "layers.*.feed_forward.down_proj": "rowwise",
}
_SHARED_MLP: Rows = {
    "layers.*.shared_mlp.input_linear": "packed_colwise",
    "layers.*.shared_mlp.output_linear": "rowwise",
}


def _under(child: str, *rows: Rows) -> Rows:
    """The same of a layer whose one child is called alike, whatever it is."""
    found: dict[str, str] = {}
    for key, style in (item for one in rows for item in one.items()):
        found[f"layers.*.{child}.{key.split('.', 3)[3]}"] = style
    return found


FAMILIES: Mapping[str, Rows] = {
    "qwen3_next": _DELTA_NET,
    "qwen3_5_text": _DELTA_NET,
    "qwen3_5_moe_text": _DELTA_NET,
    "bamba": {**_ATTENTION, **_MAMBA_2, **_FEED_FORWARD},
    "falcon_h1": {**_ATTENTION, **_MAMBA_2, **_FEED_FORWARD},
    "granitemoehybrid": {**_ATTENTION, **_MAMBA_2, **_SHARED_MLP},
    "nemotron_h": {
        **_under("mixer", _ATTENTION, _MLP, _MAMBA_2),
        # Not in a model without them.
        "layers.*.mixer.experts": "moe_tp_experts",
        "layers.*.mixer.experts.up_proj": "colwise",
        "layers.*.mixer.experts.down_proj": "rowwise",
    },
    "olmo_hybrid": {
        **_NORMS_OVER_HEADS,
        "layers.*.linear_attn.q_proj": "colwise",
        "layers.*.linear_attn.k_proj": "colwise",
        "layers.*.linear_attn.v_proj": "colwise",
        "layers.*.linear_attn.a_proj": "colwise",
        "layers.*.linear_attn.b_proj": "colwise",
        "layers.*.linear_attn.g_proj": "colwise",
        "layers.*.linear_attn.conv1d": "packed_colwise",
        "layers.*.linear_attn.A_log": "colwise",
        "layers.*.linear_attn.dt_bias": "colwise",
        "layers.*.linear_attn.o_norm": "replicated_with_grad_allreduce",
        "layers.*.linear_attn.o_proj": "rowwise",
    },
    "phi3": {
        "layers.*.self_attn.qkv_proj": "packed_colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        **_PACKED_MLP,
    },
    "glm": _PACKED_MLP,
    "glm4": _PACKED_MLP,
    "glm4_moe": _HEAD_NORMS,
    # Transformers splits whole experts alone.
    "gpt_oss": {**_ATTENTION, "layers.*.self_attn.sinks": "colwise"},
    "gemma4_text": {
        "embed_tokens_per_layer": "embedding_rowwise",
        "per_layer_model_projection": "replicate",
        "per_layer_projection_norm": "replicate",
        "layers.*.per_layer_input": "sequence",
        "layers.*.per_layer_input_gate": "replicated_with_grad_allreduce",
        "layers.*.per_layer_projection": "replicated_with_grad_allreduce",
        "layers.*.router": "replicated_with_grad_allreduce",
    },
    "gpt_neox": {"layers.*.attention.query_key_value": "colwise_by_head"},
    "olmo2": _NORMS_OVER_HEADS,
    "olmo3": _NORMS_OVER_HEADS,
    "olmoe": _NORMS_OVER_HEADS,
    "flex_olmo": _NORMS_OVER_HEADS,
    "minimax_m2": _NORMS_OVER_HEADS,
    "deepseek_v2": _LATENT_ATTENTION,
    "deepseek_v3": _LATENT_ATTENTION,
    "minicpm3": _LATENT_ATTENTION,
    "glm4_moe_lite": _LATENT_ATTENTION,
    "youtu": _LATENT_ATTENTION,
    "axk1": _LATENT_ATTENTION,
    "deepseek_v32": {**_LATENT_ATTENTION, **_INDEXER},
    "glm_moe_dsa": {**_LATENT_ATTENTION, **_INDEXER},
    "afmoe": {
        **_ATTENTION,
        **_HEAD_NORMS,
        **_MLP,
        **_SHARED_EXPERTS,
        "layers.*.self_attn.gate_proj": "colwise",
    },
    "persimmon": {
        "layers.*.self_attn.query_key_value": "colwise_by_head",
        "layers.*.self_attn.q_layernorm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_layernorm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    },
    "granitemoe": _ATTENTION,
    "granitemoeshared": {**_ATTENTION, **_SHARED_MLP},
    "solar_open": _SHARED_EXPERTS,
    "kolibri1": _SHARED_EXPERTS,
    "sarvam_moe": _HEAD_NORMS,
    "sarvam_mla": _LATENT_ATTENTION,
    "phimoe": _ATTENTION,
    "hunyuan_v1_moe": {
        **_HUNYUAN,
        "layers.*.mlp.shared_mlp.gate_proj": "colwise",
        "layers.*.mlp.shared_mlp.up_proj": "colwise",
        "layers.*.mlp.shared_mlp.down_proj": "rowwise",
    },
    "hunyuan_v1_dense": _HUNYUAN,
    "glm4v_text": _PACKED_MLP,
    "glm_ocr_text": _PACKED_MLP,
    "stablelm": {**_ATTENTION, **_MLP},
    "qwen3_vl_text": {**_ATTENTION, **_HEAD_NORMS, **_MLP},
    "qwen3_vl_moe_text": {**_ATTENTION, **_HEAD_NORMS, **_MLP},
    "emu3": {**_ATTENTION, **_MLP},
    "bitnet": {
        **_ATTENTION,
        **_MLP,
        "layers.*.self_attn.attn_sub_norm": "colwise",
        "layers.*.mlp.ffn_sub_norm": "colwise",
    },
    "apertus": _ACTIVATION,
    "apertus1p5_text": _ACTIVATION,
}

# Whose layers drop hidden states in places that hf_sp gives the right masks: tokens between blocks,
# heads and features before a row linear, its outputs behind it. Not what a block is given.
DROPOUT = {"gpt_neox", "gptj", "phi", "phi3", "seed_oss", "starcoder2"}


def plan_strings(model: Any) -> dict[str, str]:
    """A model's plan: its own ``tp_plan``, with the rows here."""
    rows = FAMILIES.get(model.config.get_text_config().model_type, {})
    paths = [path for path, _ in (*model.named_modules(), *model.named_parameters())]
    embedding = model.get_input_embeddings()
    decoder = next((p for p, m in model.named_modules() if m is embedding), "").rpartition(".")[0]
    theirs = getattr(model, "tp_plan", None) or {}
    styles = {key: s for key, s in theirs.items() if _is_ours(key, paths, decoder)}
    # Not those of a vision tower.
    stacks = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and inside(path, decoder)
    ]
    for key, style in rows.items():
        container, _, below = key.partition(".*.")
        if not below:
            styles |= {path: style for path in paths if f".{path}".endswith(f".{key}")}
        for stack in stacks:
            whole = f"{stack}.*.{below}"
            # Not "layers" in the place of "encoder.layers": the key names all of it but the prefix.
            if not f".{stack}".endswith(f".{container}"):
                continue
            layer = model.get_submodule(f"{stack}.0") if style == "sequence" else None
            argument = layer is not None and below in inspect.signature(layer.forward).parameters
            if argument or any(fnmatchcase(path, whole) for path in paths):
                styles[whole] = style
            else:
                styles.pop(whole, None)
    return styles


def _is_ours(key: str, paths: list[str], decoder: str) -> bool:
    """Whether transformers' key is of the decoder, and not of experts that this model lacks.

    What it says of a vision tower is not carried out: each rank computes that whole.
    """
    if ".experts" in key and not any(fnmatchcase(path, key) for path in paths):
        return False
    return inside(key, decoder) or "." not in key
