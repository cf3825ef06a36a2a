"""The placement of several tensors that are packed in one: a private class of DTensor's.

``_StridedShard`` is what FSDP over TP uses; ``full_tensor()`` puts it together rightly. It knows
parts of one size (gate and up); those of several (q, k and v) are a subclass, which DTensor, that
makes placements anew from their numbers, has to be told of. Held with torch 2.11 to 2.14 in mind by
tests/unit/test_torch_private.py. Must not know hf_sp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard


def packed_shard(dim: int, sizes: Sequence[int] = (1, 1)) -> Placement:
    """Each of several tensors packed along ``dim`` split over the axis: part r of all on rank r.

    What DTensor calls strided sharding, for FSDP over TP; ``full_tensor()`` unpacks it rightly.
    ``sizes`` say how long the tensors are, relative to each other.
    """
    parts = _Parts([size // math.gcd(*sizes) for size in sizes])
    return _StridedShard(dim, split_factor=parts if len({*parts.sizes}) > 1 else len(sizes))


def is_packed(placement: Placement) -> TypeGuard[_StridedShard]:
    """Whether a placement is one of ``packed_shard``."""
    return isinstance(placement, _StridedShard)


def is_unequal(split_factor: Any) -> bool:
    """Whether a placement's ``split_factor`` is of tensors of several sizes; FSDP's is a number."""
    return isinstance(split_factor, _Parts)


def packed_sizes(split_factor: Any, size: int) -> list[int]:
    """How long the tensors are that a placement of ``packed_shard`` packs in a dim of that size."""
    sizes = split_factor.sizes if is_unequal(split_factor) else (1,) * split_factor
    return [part * size // sum(sizes) for part in sizes]


class _Parts(int):
    """A ``split_factor`` of tensors of several sizes; the number is that of the parts' units.

    DTensor makes placements anew for results of operators, of a dim and of this number.
    """

    sizes: tuple[int, ...]

    def __new__(cls, sizes: Sequence[int]) -> _Parts:
        self = super().__new__(cls, sum(sizes))
        self.sizes = tuple(sizes)
        return self


class _PackedShard(_StridedShard):
    """Strided sharding of tensors of several sizes: DTensor's, but for how a tensor is cut."""

    def __init__(self, dim: int, *, split_factor: _Parts) -> None:
        super().__init__(dim, split_factor=int(split_factor))
        self._parts = split_factor

    @property
    def split_factor(self) -> _Parts:  # type: ignore[override]
        return self._parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PackedShard) and other._what() == self._what()

    def _what(self) -> tuple[int, tuple[int, ...]]:
        return self.dim, self._parts.sizes

    def __hash__(self) -> int:
        return hash(self._what())

    def __repr__(self) -> str:
        return "_PackedShard(dim={}, sizes={})".format(*self._what())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return packed_shard, self._what()

    def _split_tensor(
        self, tensor: Tensor, num_chunks: int, *, with_padding: bool = True, contiguous: bool = True
    ) -> tuple[list[Tensor], list[int]]:
        whole = tensor.split(packed_sizes(self._parts, tensor.shape[self.dim]), self.dim)
        cut = [part.chunk(num_chunks, self.dim) for part in whole]
        # The plan divides: no rank has more than others.
        return [torch.cat(own, self.dim) for own in zip(*cut, strict=True)], [0] * num_chunks


def _new_placement(cls: Any, dim: Any = None, *, split_factor: Any = 1, **kwargs: Any) -> Any:
    # Python goes on to the __init__ of what it is given.
    return _new_strided(_PackedShard if isinstance(split_factor, _Parts) else cls)


_new_strided: Any = _StridedShard.__new__
setattr(_StridedShard, "__new__", _new_placement)  # noqa: B010 (no method to mypy)
