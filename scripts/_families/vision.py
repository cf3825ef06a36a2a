"""Tiny vision-language models, with pictures: what wraps a text model that hf_sp parallelizes.

Owns: small configs of both towers, batches with pixels and of text alone. As ``models``, it must
not know hf_sp or ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PretrainedConfig

from scripts._families import models

IMAGE = 90
_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": 5,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 4,
    "image_size": 16,
}
_QWEN: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_MULTIMODAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
# Sixteen features of a head, of which a quarter is rotated.
_INTERLEAVED_ROPE = {**_MULTIMODAL_ROPE, "partial_rotary_factor": 0.5, "mrope_interleaved": True}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    **{name: models.SMALL[name] for name in models.SMALL if name.startswith("linear_")},
}
_SPARSE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 93}
_MARKS = {**_TOKENS, "vision_start_token_id": 91, "vision_end_token_id": 92}
_MARKS_OF_GLM = {**_TOKENS, "image_start_token_id": 91, "image_end_token_id": 92}
# family -> the text model's config besides _TEXT, the vision tower's, the wrapper's
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {"model_type": "gemma3_text", "layer_types": ["sliding_attention", "full_attention"]},
        {**_TOWER, "model_type": "siglip_vision_model"},
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE},
    ),
    "gemma4": (
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 16,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 96,
            "pad_token_id": 0,
        },
        {
            **_TOWER,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "global_head_dim": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 16,
        },
        {"image_token_id": IMAGE, "audio_config": None},
    ),
    "glm4v": (
        {"rope_parameters": _MULTIMODAL_ROPE},
        {
            **_TOWER,
            "depth": 2,
            "num_heads": 4,
            "out_hidden_size": 64,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        _MARKS_OF_GLM,
    ),
    "internvl": (
        {"model_type": "qwen2"},
        {
            **_TOWER,
            "image_size": [16, 16],
            "patch_size": [4, 4],
            "use_absolute_position_embeddings": True,
        },
        {"image_token_id": IMAGE, "image_seq_length": 4, "downsample_ratio": 0.5},
    ),
    "llava": (
        {"model_type": "llama"},
        {**_TOWER, "model_type": "clip_vision_model", "image_size": 8, "projection_dim": 32},
        {"image_token_index": IMAGE, "image_seq_length": 4},
    ),
    "mistral3": (
        {"model_type": "mistral"},
        {**_TOWER, "model_type": "pixtral", "head_dim": 8},
        {"image_token_index": IMAGE, "spatial_merge_size": 2},
    ),
    "paligemma": (
        {"model_type": "gemma2"},
        {**_TOWER, "model_type": "siglip_vision_model", "image_size": 8},
        {"image_token_index": IMAGE, "projection_dim": 64},
    ),
    "qwen2_5_vl": (
        {"rope_parameters": _MULTIMODAL_ROPE},
        {**_QWEN, "window_size": 16, "fullatt_block_indexes": [1]},
        _MARKS,
    ),
    "qwen2_vl": (
        {"rope_parameters": _MULTIMODAL_ROPE},
        {**_QWEN, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        _MARKS,
    ),
    "qwen3_5": (
        {**_HYBRID, "rope_parameters": _INTERLEAVED_ROPE},
        {**_QWEN, "num_position_embeddings": 16},
        _MARKS,
    ),
    "qwen3_5_moe": (
        {**_HYBRID, **_SPARSE, "rope_parameters": _INTERLEAVED_ROPE},
        {**_QWEN, "num_position_embeddings": 16},
        _MARKS,
    ),
    "qwen3_vl": (
        {"rope_parameters": _MULTIMODAL_ROPE},
        {**_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        _MARKS,
    ),
    "qwen3_vl_moe": (
        {**_SPARSE, "rope_parameters": _MULTIMODAL_ROPE},
        {**_QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        _MARKS,
    ),
    "smolvlm": (
        {"model_type": "llama"},
        {**_TOWER, "model_type": "smolvlm_vision", "image_size": 16},
        {"image_token_id": IMAGE, "scale_factor": 2},
    ),
}


def config(family: str) -> PretrainedConfig:
    """A small config of a family."""
    text, tower, more = FAMILIES[family]
    return CONFIG_MAPPING[family](text_config={**_TEXT, **text}, vision_config=tower, **more)


def build(family: str, seed: int = 0) -> Any:
    """A model in float64; weights are ``models.fill``'s."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config(family), dtype=torch.float64)
    return models.fill(model, seed)


def batches(family: str, left: bool) -> list[dict[str, Tensor]]:
    """A picture in each row and padding, an odd length; then text alone."""
    generator = torch.Generator().manual_seed(0)
    made = models.batches(88, left, generator)
    first = made[0]
    # Behind the padding and before it.
    first["input_ids"][:, 5:9] = IMAGE
    first["input_ids"][:, 4], first["input_ids"][:, 9] = 91, 92
    first["labels"][:, 4:10] = -100
    seen = (first["input_ids"] == IMAGE).long()
    side = 8 if family in ("llava", "paligemma") else 16
    pixels = torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)
    if family.startswith(("qwen", "glm")):
        # Patches of 2 frames, 4 x 4 pixels and 3 colours, 16 of a picture.
        pixels = torch.randn(32, 96, generator=generator, dtype=torch.float64)
        first["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        first["mm_token_type_ids"] = seen
    elif family == "gemma4":
        # Patches of 4 x 4 pixels, and the place of each.
        pixels = torch.rand(2, 16, 48, generator=generator, dtype=torch.float64)
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        first["image_position_ids"] = places.expand(2, 16, 2).contiguous()
        first["mm_token_type_ids"], made[1]["mm_token_type_ids"] = seen, 0 * made[1]["input_ids"]
    elif family in ("gemma3", "paligemma"):
        first["token_type_ids"], made[1]["token_type_ids"] = seen, 0 * made[1]["input_ids"]
    elif family == "mistral3":
        first["image_sizes"] = torch.tensor([[16, 16]] * 2)
    elif family == "smolvlm":
        pixels = pixels[:, None]
    first["pixel_values"] = pixels
    return made
