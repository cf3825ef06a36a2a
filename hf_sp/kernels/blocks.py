"""The torch path in blocks of rows: its float32 temporaries are then a block's, not the tensor's.

The kernels have no such temporaries, so that counts made without a GPU (``hf_sp.estimate``) show a
GPU's peak, and a CPU needs no more than it has to. Rows are independent, but for the weight's
gradient, which is summed over the blocks in their order.

Must not know what is computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

BLOCK = 2**20
"""Elements of a block."""

Results = tuple[Tensor | None, ...]


def by_blocks(
    run: Callable[..., Results], *rows: Tensor | None, summed: int = 0, block: int | None = None
) -> Results:
    """``run(*rows)``, block by block where the rows are many.

    Args:
        run: returns tensors with the rows of its arguments, ``[..., n]`` or ``[...]``.
        rows: tensors ``[..., N]`` or ``[...]``; the first is ``[..., N]`` and not None.
        summed: how many of the last results have no rows, and are summed over the blocks.
        block: elements of a block of the first.
    """
    first = rows[0]
    assert first is not None
    block = BLOCK if block is None else block
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
        for place, part in enumerate(parts):
            if start == 0:
                whole.append(part if place >= inner else _room(part, first))
                if place >= inner:
                    continue
            target = whole[place]
            if target is None or part is None:
                continue
            if place < inner:
                target.narrow(dim, start, count).copy_(part)
            else:
                target.add_(part)
    return tuple(whole)


def _room(part: Tensor | None, first: Tensor) -> Tensor | None:
    """Memory for all blocks of what ``part`` is one block of, laid out as the first tensor is."""
    if part is None:
        return None
    if part.dim() == first.dim():
        return torch.empty_like(first, dtype=part.dtype)
    return part.new_empty(first.shape[:-1])
