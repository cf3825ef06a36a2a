"""Rows of tensors as two strides, so that views are read where they lie.

Must not know what is computed on the rows. All of it depends on shapes and strides alone, and is
worked out once for each: a launch only looks it up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_Shape = tuple[int, ...]
# Lengths of batches vary; an entry is some hundred bytes.
_cached = lru_cache(4096)


@dataclass(frozen=True, slots=True)
class Rows:
    """How the leading dimensions of several tensors alike are walked, in one common order.

    Row r of tensor t starts at ``(r // inner) * strides[t][0] + (r % inner) * strides[t][1]``.
    """

    count: int
    inner: int
    strides: tuple[tuple[int, int], ...]


def rows_of(tensors: Sequence[Tensor | None], lead: Tensor) -> Rows | None:
    """Collapse the leading dimensions to two levels that all tensors share; None if it takes three.

    Args:
        tensors: shaped as lead (a tensor of one number per row may lack the last dimension), in the
            order in which the strides are wanted; a missing one gets lead's.
        lead: the tensor whose order in memory is the order of the walk.
    """
    order = lead.stride()
    strides = tuple([order if x is None else x.stride() for x in tensors])
    return _collapse(lead.shape, order, strides)


@_cached
def _collapse(shape: _Shape, order: _Shape, strides: tuple[_Shape, ...]) -> Rows | None:
    dims = [dim for dim in range(len(shape) - 1) if shape[dim] != 1]
    dims.sort(key=lambda dim: -order[dim])
    levels: list[tuple[int, list[int]]] = []
    for dim in dims:
        size, steps = shape[dim], [stride[dim] for stride in strides]
        if levels and all(a == b * size for a, b in zip(levels[-1][1], steps, strict=True)):
            levels[-1] = levels[-1][0] * size, steps
        else:
            levels.append((size, steps))
    if len(levels) > 2:
        return None
    # An inner size of 1 is a constant to the compiler, and no division is left.
    levels += [(1, [0] * len(strides))] * (2 - len(levels))
    (outer_size, outer), (inner_size, inner) = levels
    return Rows(outer_size * inner_size, inner_size, tuple(zip(outer, inner, strict=True)))


def readable(lead: Tensor, *others: Tensor) -> tuple[Any, ...]:
    """``(lead, *others)``, alike in shape, such that the rows can be walked together.

    As they are if possible, else copies; lead keeps its order in memory if any can.
    """
    tensors = (lead, *others)
    if _together(lead.shape, tuple([x.stride() for x in tensors])):
        return tensors
    tensors = tuple(x if _has_rows(x.shape, x.stride()) else x.contiguous() for x in tensors)
    if _together(lead.shape, tuple([x.stride() for x in tensors])):
        return tensors
    lead, *rest = tensors
    if not _together(lead.shape, (lead.stride(),)):
        lead = lead.contiguous()
    return lead, *(torch.empty_like(lead, dtype=x.dtype).copy_(x) for x in rest)


@_cached
def _together(shape: _Shape, strides: tuple[_Shape, ...]) -> bool:
    """Whether rows that lie so can be walked together, and with results laid out as the first."""
    if not all(_has_rows(shape, stride) for stride in strides):
        return False
    fresh = torch.empty_like(torch.empty_strided(shape, strides[0], device="meta")).stride()
    return _collapse(shape, strides[0], (*strides, fresh)) is not None


def _has_rows(shape: _Shape, stride: _Shape) -> bool:
    """Whether the last dimension is contiguous."""
    return stride[-1] == 1 or shape[-1] == 1
