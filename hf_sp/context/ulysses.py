"""DeepSpeed Ulysses: all tokens of some heads for some tokens of all heads, and back.

Shape letters: B batch, S sequence, P tokens of this rank's part, n query heads here, a = n / cp,
c key/value heads that a rank attends with, D and E features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis


def heads_of_ranks(query: int, key_value: int, cp: int) -> list[int]:
    """Which key/value heads go to the cp ranks, in rank order, c for each.

    A rank's ``a`` query heads read them evenly, ``a / c`` each. Where cp divides the key/value
    heads each travels once; else as often as there are ranks whose query heads read it.
    """
    own, group = query // cp, query // key_value
    step = math.gcd(own, group)
    return [first // group for first in range(0, query, step)]


def to_heads(q: Tensor, k: Tensor, v: Tensor, S: int, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the axis's S tokens, for this rank's heads.

    Shapes:   q [B, n, P, D], k [B, m, P, D], v [B, m, P, E] -> q [B, a, S, D], k [B, c, S, D],
              v [B, c, S, E]; features contiguous
    Forward:  1 all-to-all of ``[cp, P, B, a D + c (D + E)]``, of which a rank keeps a cp-th
    Backward: 1 all-to-all of the same size; gradients of heads that travelled more than once are
              summed
    Saves:    nothing
    Source:   Jacobs et al. 2023, arXiv:2309.14509
    """
    cp = axis.size
    if cp == 1:
        return q[:, :, :S], k[:, :, :S], v[:, :, :S]
    heads = heads_of_ranks(q.shape[1], k.shape[1], cp)
    if heads != list(range(k.shape[1])):
        index = torch.tensor(heads, device=k.device)
        k, v = k.index_select(1, index), v.index_select(1, index)
    return _ToHeads.apply(S, axis, q, k, v)


def to_sequence(x_BSaE: Tensor, P: int, axis: Axis) -> Tensor:
    """All heads of this rank's P tokens.

    Shapes:   x [B, S, a, E] -> [B, P, n, E]
    Forward:  1 all-to-all of ``[cp, P, B, a E]``
    Backward: 1 all-to-all of the same size
    Saves:    nothing
    """
    if axis.size == 1:
        missing = P - x_BSaE.shape[1]
        return F.pad(x_BSaE, (0, 0, 0, 0, 0, missing)) if missing else x_BSaE
    return _ToSequence.apply(x_BSaE, P, axis)


def _spread(pieces: Sequence[Tensor], S: int, axis: Axis) -> list[Tensor]:
    """``[B, cp * c, P, D]`` each -> ``[B, c, S, D]``, in one all-to-all."""
    cp = axis.size
    P = pieces[0].shape[2]
    split = [x.unflatten(1, (cp, -1)).permute(1, 3, 0, 2, 4).flatten(3) for x in pieces]
    sent = (torch.cat(split, -1) if len(split) > 1 else split[0]).flatten(0, 1)
    found = comm.all_to_all(sent, [P] * cp, [P] * cp, axis)[:S]
    sizes = [x.shape[-1] for x in split]
    return [
        part.unflatten(-1, (-1, x.shape[-1])).permute(1, 2, 0, 3)
        for part, x in zip(found.split(sizes, -1), pieces, strict=True)
    ]


def _collect(pieces: Sequence[Tensor], P: int, axis: Axis) -> list[Tensor]:
    """``[B, c, S, D]`` each -> ``[B, cp * c, P, D]``, in one all-to-all."""
    cp = axis.size
    B, _, S, _ = pieces[0].shape
    flat = [x.permute(2, 0, 1, 3).flatten(2) for x in pieces]
    if P * cp > S:
        width = sum(x.shape[-1] for x in flat)
        flat.append(flat[0].new_zeros(P * cp - S, B, width))
        *rows, padding = flat
        sent = torch.cat([torch.cat(rows, -1) if len(rows) > 1 else rows[0], padding])
    else:
        sent = torch.cat(flat, -1) if len(flat) > 1 else flat[0]
    sizes = [x.shape[1] * x.shape[3] for x in pieces]
    found = comm.all_to_all(sent, [P] * cp, [P] * cp, axis).unflatten(0, (cp, P))
    return [
        part.unflatten(-1, (-1, x.shape[-1])).permute(2, 0, 3, 1, 4).flatten(1, 2)
        for part, x in zip(found.split(sizes, -1), pieces, strict=True)
    ]


class _ToHeads(Node):
    @staticmethod
    def forward(ctx: Any, S: int, axis: Axis, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.axis, ctx.length = axis, pieces[0].shape[2]
        return tuple(_spread(pieces, S, axis))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, *_collect(grads, ctx.length, ctx.axis)


class _ToSequence(Node):
    @staticmethod
    def forward(ctx: Any, x_BSaE: Tensor, P: int, axis: Axis) -> Tensor:
        ctx.axis, ctx.length = axis, x_BSaE.shape[1]
        return _collect([x_BSaE.transpose(1, 2)], P, axis)[0].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = _spread([grads[0].transpose(1, 2)], ctx.length, ctx.axis)
        return found[0].transpose(1, 2), None, None
