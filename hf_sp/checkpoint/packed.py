"""Packed parameters (gate and up in one tensor), whose shards are no rectangles: their halves' are.

Must not know transformers.
"""

from __future__ import annotations

from torch import nn

from hf_sp.plan.experts import is_experts


def packed_dims(model: nn.Module) -> dict[str, int]:
    """Name of each packed parameter, parallelized or not -> the dim that holds its halves."""
    return {
        f"{path}.gate_up_proj".lstrip("."): 1
        for path, module in model.named_modules()
        if is_experts(module)
    }
