"""Packed parameters (gate and up in one tensor): which ones a checkpoint holds as two halves.

A packed tensor that is split by features is no rectangle on any rank, so that DCP cannot write it;
its two halves are. They are written whatever the split, so that any degree and ``ep`` reads them.
Knows torch only.
"""

from __future__ import annotations

from torch import nn

from hf_sp.plan.experts import is_experts

HALVES = ("gate", "up")


def packed_dims(model: nn.Module) -> dict[str, int]:
    """Name of each packed parameter, parallelized or not -> the dim that holds its halves."""
    dims = {}
    for path, module in model.named_modules():
        if is_experts(module):
            dims[f"{path}.gate_up_proj".lstrip(".")] = 1
    return dims
