"""Rows of tensors as two strides, so that views are read where they lie.

Owns the collapse of leading dimensions. Must not know what is computed on the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """How the leading dimensions of several tensors alike are walked, in one common order.

    Row r of tensor t starts at ``(r // inner) * strides[t][0] + (r % inner) * strides[t][1]``.
    """

    count: int
    inner: int
    strides: tuple[tuple[int, int], ...]


def rows_of(tensors: Sequence[Tensor | None], lead: Tensor) -> Rows | None:
    """Collapse the leading dimensions to at most two levels that all tensors share.

    Args:
        tensors: shaped as lead (a tensor of one number per row may lack the last dimension), in the
            order in which the strides are wanted; a missing one gets lead's.
        lead: the tensor whose order in memory is the order of the walk.

    Returns:
        The walk, or None where it would take three levels.
    """
    shape, order = lead.shape, lead.stride()
    strides = [order if x is None else x.stride() for x in tensors]
    dims = [dim for dim in range(lead.dim() - 1) if shape[dim] != 1]
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
    none = [0] * len(strides)
    if len(levels) < 2:
        # One level: inner is 1, which the compiler takes for a constant, and no division is left.
        outer_size, outer = levels[0] if levels else (1, none)
        inner_size, inner = 1, none
    else:
        (outer_size, outer), (inner_size, inner) = levels
    return Rows(outer_size * inner_size, inner_size, tuple(zip(outer, inner, strict=True)))


def readable(lead: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Inputs whose rows are contiguous and can be walked together: views if possible, else copies.

    Args:
        lead: keeps its order in memory if any can.
        others: shaped as lead, or None.

    Returns:
        ``(lead, *others)``.
    """
    if _all_contiguous(lead, *others):
        return lead, *others
    lead = lead if has_rows(lead) else lead.contiguous()
    others = tuple(x if x is None or has_rows(x) else x.contiguous() for x in others)
    fresh = torch.empty_like(lead)  # the layout that results will have
    if rows_of([lead, *others, fresh], lead) is not None:
        return lead, *others
    if rows_of([lead, fresh], lead) is None:
        lead = lead.contiguous()
    return lead, *(x if x is None else _laid_out(x, lead) for x in others)


def has_rows(x: Tensor) -> bool:
    """Whether the last dimension is contiguous."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _all_contiguous(*tensors: Tensor | None) -> bool:
    return all(x is None or x.is_contiguous() for x in tensors)


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """A copy of x laid out in memory as another tensor of its shape is."""
    return torch.empty_like(like, dtype=x.dtype).copy_(x)
