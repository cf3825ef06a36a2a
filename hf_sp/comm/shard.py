"""Full tensors, this rank's shards of them, and DTensors: each made of the other here alone.

Nothing here communicates. Must not know models or plans.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from hf_sp.torch_private import is_packed


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """First place and end of part ``index`` of a dim, as ``torch.chunk`` and DTensor cut it.

    Pieces of ceil(size / parts), the last ones shorter or empty.
    """
    piece = -(-size // parts)
    start = min(index * piece, size)
    return start, min(start + piece, size)


def as_dtensor(
    piece: Tensor,
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    shape: Sequence[int],
    stride: Sequence[int] | None = None,
) -> DTensor:
    """The DTensor of a whole shape whose part on this rank is ``piece``; nothing is checked.

    ``stride`` is the whole tensor's, contiguous if None.
    """
    if stride is None:
        stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        piece, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


def with_local(piece: Tensor, like: DTensor) -> DTensor:
    """A DTensor laid out as ``like``, whose part on this rank is ``piece``."""
    return as_dtensor(piece, like.device_mesh, like.placements, like.shape, like.stride())


def take_shard(
    full: Tensor, placement: Placement, parts: int, index: int, device: torch.device
) -> Tensor:
    """Part ``index`` of a full tensor, contiguous, on ``device``.

    The cut is made where ``full`` is (on the CPU, as a rule), so that a GPU never holds the whole.
    A shard is a copy, so that the full storage can be freed; a replicated tensor may share it.
    """
    if is_packed(placement):
        halves = full.chunk(2, placement.dim)
        own = [take_shard(h, Shard(placement.dim), parts, index, device) for h in halves]
        return torch.cat(own, placement.dim)
    if isinstance(placement, Shard):
        start, stop = shard_range(full.shape[placement.dim], parts, index)
        piece = full.narrow(placement.dim, start, stop - start)
        return piece.to(device, copy=True).contiguous()
    return full.to(device).contiguous()


def shard_like(full: Tensor, like: DTensor, device: torch.device | None = None) -> DTensor:
    """This rank's part of a whole tensor, equal on all ranks, laid out as ``like``.

    Its mesh, placements and, without another one, device count; its dtype does not.
    """
    if isinstance(full, DTensor):
        return full
    mesh, placement = like.device_mesh, like.placements[0]
    if mesh.ndim == 1 and type(placement) in (Shard, Replicate):
        device, rank = device or like.to_local().device, mesh.get_local_rank()
        return with_local(take_shard(full, placement, mesh.size(), rank, device), like)
    return distribute_tensor(full, mesh, like.placements, src_data_rank=None)


def split_gate_up(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Gate and up of a packed tensor, copied; no communication."""
    if not isinstance(x, DTensor):
        gate, up = x.chunk(2, dim)
        return gate.contiguous(), up.contiguous()
    # FSDP's own strided sharding, of another dim, stays what it is.
    placed = [Shard(dim) if is_packed(p) and p.dim == dim else p for p in x.placements]
    shape = list(x.shape)
    shape[dim] //= 2
    gate, up = (
        as_dtensor(part.contiguous(), x.device_mesh, placed, shape)
        for part in x.to_local().chunk(2, dim)
    )
    return gate, up


def merge_gate_up(gate: Tensor, up: Tensor, dim: int, like: Tensor) -> Tensor:
    """The packed tensor of gate and up, laid out as ``like``; no communication."""
    if not isinstance(like, DTensor) or not isinstance(gate, DTensor):
        return torch.cat([gate, up], dim)
    assert isinstance(up, DTensor)
    return with_local(torch.cat([gate.to_local(), up.to_local()], dim), like)
