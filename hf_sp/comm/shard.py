"""Full tensors, this rank's shards of them, and DTensors: each made of the other here alone.

Nothing here communicates. Must not know models or plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from hf_sp.errors import ShapeError
from hf_sp.torch_packed import is_packed, packed_shard, packed_sizes
from hf_sp.torch_private import local_tensor


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
        packed = full.split(
            packed_sizes(placement.split_factor, full.shape[placement.dim]), placement.dim
        )
        own = [take_shard(x, Shard(placement.dim), parts, index, device) for x in packed]
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


def draw_whole(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> DTensor:
    """Fill a DTensor with the random numbers of one process: those that the first rank draws.

    torch draws each rank's part with that rank's generator on a CPU: ranks that are seeded alike
    have the same numbers in all parts, others have other numbers in a replicated tensor.
    """
    x: DTensor = args[0]
    drawn = op(torch.empty(x.shape, dtype=x.dtype, device=x.device), *args[1:], **kwargs)
    told = distribute_tensor(drawn, x.device_mesh, [Replicate()] * x.device_mesh.ndim)
    local_tensor(x).copy_(local_tensor(shard_like(local_tensor(told), x)))
    return x


def laid_out_as(x: DTensor, value: Tensor) -> DTensor:
    """A whole tensor, the same on all ranks, or a DTensor of any layout, laid out as ``x``.

    Raises:
        ShapeError: it has another shape.
    """
    if value.shape != x.shape:
        raise ShapeError(
            "the data of a sharded parameter is of another shape",
            got=f"{tuple(value.shape)}",
            rule=f"p.data = value keeps the shape of the whole parameter, {tuple(x.shape)}",
            remedy="change shapes before parallelize",
        )
    if isinstance(value, DTensor) and value.placements != x.placements:
        value = value.full_tensor()
    return shard_like(value, x)


def split_packed(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """The tensors that are packed in one, copied; no communication."""
    if not isinstance(x, DTensor):
        return tuple(part.contiguous() for part in x.chunk(2, dim))
    # FSDP's own strided sharding, of another dim, stays what it is. Whole experts are split by
    # another dim, and are two halves.
    packed: Any = next(
        (p for p in x.placements if is_packed(p) and p.dim == dim), packed_shard(dim)
    )
    placed = [Shard(dim) if p is packed else p for p in x.placements]
    parts, shape = [], list(x.shape)
    sizes = packed_sizes(packed.split_factor, x.shape[dim])
    for shape[dim], part in zip(sizes, split_local(x, packed), strict=True):
        parts.append(as_dtensor(part.contiguous(), x.device_mesh, placed, shape))
    return tuple(parts)


def split_local(x: DTensor, packed: Any) -> tuple[Tensor, ...]:
    """Views of this rank's parts of the tensors that are packed in one."""
    local = local_tensor(x).detach()
    return local.split(packed_sizes(packed.split_factor, local.shape[packed.dim]), packed.dim)


def merge_packed(parts: Sequence[Tensor], dim: int, like: Tensor) -> Tensor:
    """The packed tensor of its parts, laid out as ``like``; no communication."""
    if not isinstance(like, DTensor):
        return torch.cat([*parts], dim)
    return with_local(torch.cat([part.to_local() for part in cast(Any, parts)], dim), like)
