"""Packed parameters (gate and up in one), whose shards are no rectangles: their parts' are.

Must not know transformers.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import DTensor

from hf_sp.plan.experts import packed_experts
from hf_sp.torch_packed import is_packed


def packed_dims(model: nn.Module) -> dict[str, int]:
    """Name of each packed parameter, parallelized or not -> the dim that holds its parts."""
    found = {
        f"{path}.{name}".lstrip("."): dim
        for path, module in model.named_modules()
        for name, dim in packed_experts(module).items()
    }
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            for axis, placed in zip(p.device_mesh.mesh_dim_names or (), p.placements, strict=True):
                if axis == "tp" and is_packed(placed):
                    found[name] = placed.dim
    return found
