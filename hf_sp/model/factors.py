"""Low-rank factors beside the parallel linears, as cheap as they can be made.

A factor pair adds ``s B (A x)`` to a linear. In a column linear A is replicated and B holds the
local output rows; in a row linear A holds the local input columns and B is replicated. Three facts
carry everything here (Hu et al. 2021, arXiv:2106.09685, with Korthikanti et al. 2022):

- Column: every rank has the gathered input, so ``u = A x`` needs no collective. The gradient of u
  is partial (each rank has some output rows). It travels to its tokens' rank as ``r`` more columns
  of the block's one reduce-scatter; left are ``dA = du^T x`` and ``dx += du A`` on the *shard*. So
  neither is the gathered input saved nor gathered again.
- Row: B is linear, so that ``B (A_i x_i)`` is a partial sum like the linear's own and shares the
  block's reduction.
- The replicated factor's gradient is a sum over the ranks in either case. It is part of the
  autograd graph, and one all-reduce serves all A of a block.

Shape letters: B batch, S sequence, s = S / tp, H hidden, f local in features of a row linear,
r rank of one pair, R sum of the ranks of a block's pairs. Knows tensors only: what a pair belongs
to is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.collectives import Axis

# --- dropout ------------------------------------------------------------------------------------


def keep_mask(seed: int, shape: torch.Size, p: float, like: Tensor) -> Tensor:
    """Which elements are kept, from the seed alone: made again in backward, never stored."""
    generator = torch.Generator(like.device).manual_seed(seed % 2**63)
    return torch.rand(shape, generator=generator, device=like.device) >= p


@dataclass(frozen=True, slots=True)
class Dropout:
    """One draw of dropout in front of a factor.

    Args:
        p: probability of dropping.
        seed: what its masks are made from. Drawn from torch's default generator, which
            checkpointing restores before it recomputes.
    """

    p: float
    seed: int

    @classmethod
    def draw(cls, p: float) -> Dropout | None:
        """A new draw, on all ranks alike; None where nothing is dropped."""
        return cls(p, int(torch.randint(2**62, ()))) if p > 0 else None

    def part(self, x: Tensor, index: int) -> Tensor:
        """Drop in part ``index`` of what the ranks see as one tensor; parts are independent."""
        if self.p >= 1:
            return torch.zeros_like(x)
        keep = keep_mask(self.seed + index, x.shape, self.p, x)
        return (x * (1 / (1 - self.p))).masked_fill(~keep, 0)

    def parts(self, x_SBH: Tensor, count: int) -> Tensor:
        """Drop in a gathered tensor as each of the ``count`` owners of its rows would."""
        height = comm.padded(x_SBH.shape[0], count) // count
        pieces = []
        for index in range(count):
            piece = x_SBH[index * height : (index + 1) * height]
            missing = height - piece.shape[0]
            if missing:
                # The owner's shard is padded: the mask has to be of its shape.
                piece = torch.cat([piece, piece.new_zeros(missing, *piece.shape[1:])])
            pieces.append(self.part(piece, index))
        return torch.cat(pieces)[: x_SBH.shape[0]]


# --- column: factors that read a block's gathered input -----------------------------------------


class EntryReader(Protocol):
    """A module in a TP block whose factors read the block's input."""

    def entry_factors(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """``(key, A [r, H])`` of each pair that the coming forward uses."""
        ...


@dataclass(frozen=True, slots=True)
class FactorGradient:
    """What the backward of one pair leaves for the block's entry."""

    slot: int
    du: Tensor
    factor: Tensor
    dropout: Dropout | None


def join_gradients(partial: Tensor | None, waiting: list[FactorGradient], height: int) -> Tensor:
    """The block's input gradient and the gradients of u side by side: one buffer to reduce.

    Args:
        partial: ``[S, B, H]`` partial input gradient, padded; None if nobody wants it.
        waiting: the pairs' gradients, ``[S, B, r]`` each, not padded.
        height: rows of the padded buffer.

    Returns:
        ``[height, B, H + R]``.
    """
    first = waiting[0].du if partial is None else partial
    pieces = [] if partial is None else [partial]
    for one in waiting:
        missing = height - one.du.shape[0]
        du = F.pad(one.du, (0, 0, 0, 0, 0, missing)) if missing else one.du
        pieces.append(du.to(first.dtype))
    return torch.cat(pieces, -1)


def split_gradients(
    reduced: Tensor,
    waiting: list[FactorGradient],
    x: Tensor | None,
    needs: list[bool],
    wants_dx: bool,
    axis: Axis,
    sharded: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """From the reduced buffer to the gradients of the shard and of every A.

    Shapes:   reduced [s, B, H + R] (R alone without ``wants_dx``), x [s, B, H] (``sharded``), or
              both with S for s
    Collectives: 1 all-reduce of all dA together if ``sharded``: each rank has its own tokens; none
              else, where x and du are whole

    Args:
        reduced: the reduced buffer, in the order of the collective.
        waiting: as they were joined.
        x: the block's input, in the same order; None if no A needs a gradient.
        needs: which A need one.
        wants_dx: whether the buffer holds the input gradient.
        axis: the tp axis.
        sharded: whether x is a sequence shard.

    Returns:
        The input gradient or None, and dA of each.
    """
    widths = [one.du.shape[-1] for one in waiting]
    H = reduced.shape[-1] - sum(widths)
    dx = reduced[..., :H] if wants_dx else None
    part = axis.rank if sharded else 0
    grads: list[Tensor | None] = []
    start = H
    for one, width, needed in zip(waiting, widths, needs, strict=True):
        du = reduced[..., start : start + width].to(one.factor.dtype)
        start += width
        if dx is not None:
            back = (du @ one.factor).to(dx.dtype)
            dx = dx + (back if one.dropout is None else one.dropout.part(back, part))
        if needed:
            assert x is not None
            seen = x if one.dropout is None else one.dropout.part(x, part)
            flat = seen.reshape(-1, seen.shape[-1]).to(one.factor.dtype)
            grads.append(du.reshape(-1, width).t() @ flat)
        else:
            grads.append(None)
    if sharded:
        _sum_together(grads, axis)
    return dx, grads


def _sum_together(grads: list[Tensor | None], axis: Axis) -> None:
    """All-reduce the gradients of one dtype as one tensor, in place of the list."""
    for dtype in dict.fromkeys(g.dtype for g in grads if g is not None):
        chosen = [i for i, g in enumerate(grads) if g is not None and g.dtype == dtype]
        rows = [grads[i].shape[0] for i in chosen]  # type: ignore[union-attr]
        total = comm.all_reduce(torch.cat([grads[i] for i in chosen]), axis)  # type: ignore[misc]
        for i, grad in zip(chosen, total.split(rows), strict=True):
            grads[i] = grad.clone() if len(chosen) > 1 else grad
