"""The torch path in blocks of rows: its float32 temporaries are then a block's, not the tensor's.

The kernels have no such temporaries, so that counts made without a GPU (``hf_sp.estimate``) show a
GPU's peak. Must not know what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_sp.torch_private import is_fake

BLOCK = 2**20  # elements


def by_blocks(
    run: Callable[..., tuple], *rows: Tensor | None, summed: int = 0, block: int = BLOCK
) -> tuple[Any, ...]:
    """``run(*rows)``, block by block where the rows are many.

    Args:
        run: returns tensors with the rows of its arguments, ``[..., n]`` or ``[...]``, or Nones.
        rows: tensors ``[..., N]`` or ``[...]``; the first is ``[..., N]`` and not None.
        summed: how many of the last results have no rows, and are summed over the blocks in order.
        block: elements of a block of the first.
    """
    first = rows[0]
    assert first is not None
    if isinstance(first, DTensor) or first.numel() <= block or first.dim() < 2:
        return run(*rows)
    dim = max(range(first.dim() - 1), key=lambda d: first.shape[d])
    height = first.shape[dim]
    step = max(1, block * height // first.numel())
    whole: list[Tensor | None] = []
    for start in range(0, height, step):
        count = min(step, height - start)
        parts = run(*(None if x is None else x.narrow(dim, start, count) for x in rows))
        inner = len(parts) - summed
        if start == 0:
            whole = [*(_room(part, first) for part in parts[:inner]), *parts[inner:]]
        for place, (target, part) in enumerate(zip(whole, parts, strict=True)):
            if target is None or target is part:
                continue
            if place < inner:
                target.narrow(dim, start, count).copy_(part)
            else:
                target.add_(part)
        if start and is_fake(first):
            break  # a count of bytes: from the second on blocks are alike
    return tuple(whole)


def _room(part: Tensor | None, first: Tensor) -> Tensor | None:
    """Memory for all blocks of what ``part`` is one block of, laid out as the first tensor is."""
    if part is None:
        return None
    if part.dim() == first.dim():
        return torch.empty_like(first, dtype=part.dtype)
    return part.new_empty(first.shape[:-1])
