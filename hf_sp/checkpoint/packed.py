"""Packed parameters (gate and up in one tensor) as DTensors that a checkpoint can hold.

A packed tensor that is split by features is no rectangle on any rank, so that DCP cannot write it;
its two halves are. They are written whatever the split, so that any degree and ``ep`` reads them.
Knows torch only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from hf_sp.plan.experts import is_experts
from hf_sp.torch_private import is_packed

HALVES = ("gate", "up")


def packed_dims(model: nn.Module) -> dict[str, int]:
    """Name of each packed parameter, parallelized or not -> the dim that holds its halves."""
    dims = {}
    for path, module in model.named_modules():
        if is_experts(module):
            dims[f"{path}.gate_up_proj".lstrip(".")] = 1
    return dims


def _placements(x: DTensor, dim: int) -> tuple[Placement, ...]:
    # FSDP's own strided sharding, of another dim, stays what it is.
    return tuple(Shard(dim) if is_packed(p) and p.dim == dim else p for p in x.placements)


def halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Both halves of a packed tensor, copied; no communication."""
    if not isinstance(x, DTensor):
        gate, up = x.chunk(2, dim)
        return gate.contiguous(), up.contiguous()
    shape = list(x.shape)
    shape[dim] //= 2
    stride = torch.empty(shape, device="meta").stride()
    first, second = (
        DTensor.from_local(
            part.contiguous(),
            x.device_mesh,
            _placements(x, dim),
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )
        for part in x.to_local().chunk(2, dim)
    )
    return first, second


def joined(gate: Tensor, up: Tensor, dim: int, like: Tensor) -> Tensor:
    """The packed tensor of two halves, laid out as ``like``; no communication."""
    if not isinstance(like, DTensor) or not isinstance(gate, DTensor):
        return torch.cat([gate, up], dim)
    assert isinstance(up, DTensor)
    return DTensor.from_local(
        torch.cat([gate.to_local(), up.to_local()], dim),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
