"""Low-rank factors beside the parallel linears, as cheap as they can be made.

A pair adds ``s B (A x)`` to a linear (Hu et al. 2021, arXiv:2106.09685). In a column linear A is
replicated and B holds the local output rows; in a row linear A holds the local input columns and B
is replicated.

- Column: every rank has the gathered input, so ``u = A x`` needs no collective. The gradient of u
  is partial (each rank has some output rows). It travels to its tokens' rank as ``r`` more columns
  of the block's one reduce-scatter; left are ``dA = du^T x`` and ``dx += du A`` on the *shard*.
- Row: ``B (A_i x_i)`` is a partial sum like the linear's own and shares the block's reduction.
- The replicated factor's gradient is a sum over the ranks, as a part of the autograd graph.

Shape letters: B batch, S sequence, s = S / tp, H hidden, f local in features of a row linear,
r rank of one pair, R sum of the ranks of a block's pairs. Knows tensors only: what a pair belongs
to is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.model.dropout import Dropout
from hf_sp.model.recompute import restored, saved_form


class FactorGradient(NamedTuple):
    """du ``[S, B, r]``, partial, that the backward of one pair has sent to its port.

    ``slot`` is the place of its A, ``factor``, among the node's inputs.
    """

    slot: int
    du: Tensor
    factor: Tensor
    dropout: Dropout | None


def join_gradients(
    partial: Tensor | None, waiting: Sequence[FactorGradient], height: int
) -> Tensor:
    """The block's input gradient and the gradients of u side by side: one buffer to reduce.

    Shapes:   partial [height, B, H], padded, or None if nobody wants it; du [S, B, r] each
              -> [height, B, H + R]
    """
    pieces = [] if partial is None else [partial]
    for one in waiting:
        missing = height - one.du.shape[0]
        pieces.append(F.pad(one.du, (0, 0, 0, 0, 0, missing)) if missing else one.du)
    return torch.cat([piece.to(pieces[0].dtype) for piece in pieces], -1)


def split_gradients(
    reduced: Tensor,
    waiting: Sequence[FactorGradient],
    x: Tensor | None,
    needs: Sequence[bool],
    wants_dx: bool,
    axis: Axis,
    sharded: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """From the reduced buffer to the gradients of the shard and of every A.

    Shapes:   reduced [s, B, H + R] (R alone without ``wants_dx``), x [s, B, H] (``sharded``), or
              both with S for s
    Collectives: 1 all-reduce of all dA together if ``sharded``: each rank has its own tokens; none
              else, where x and du are whole

    ``x`` is the block's input in the order of the collective, None if no A needs a gradient;
    ``needs`` says which do.
    """
    widths = [one.du.shape[-1] for one in waiting]
    columns = reduced.split([reduced.shape[-1] - sum(widths), *widths], -1)
    dx = columns[0] if wants_dx else None
    part = axis.rank if sharded else 0
    grads: list[Tensor | None] = [None] * len(waiting)
    # The pairs of a block share one draw of dropout: one mask, one pass over x and over dx.
    for dropout in {id(one.dropout): one.dropout for one in waiting}.values():
        members = [i for i, one in enumerate(waiting) if one.dropout is dropout]
        A = torch.cat([waiting[i].factor for i in members])
        A = A if dropout is None else A * dropout.scale
        du = torch.cat([columns[1 + i] for i in members], -1).to(A.dtype)
        if dx is not None:
            back = (du @ A).to(dx.dtype)
            dx = dx + (back if dropout is None else dropout.part(back, part))
        if any(needs[i] for i in members):
            assert x is not None
            seen = x if dropout is None else dropout.part(x, part)
            dA = du.flatten(0, 1).t() @ seen.reshape(-1, seen.shape[-1]).to(A.dtype)
            dA = dA if dropout is None else dA * dropout.scale
            rows = dA.split([waiting[i].factor.shape[0] for i in members])
            for i, grad in zip(members, rows, strict=True):
                grads[i] = grad if needs[i] else None
    if sharded:
        _sum_together(grads, axis)
    return dx, grads


def _sum_together(grads: list[Tensor | None], axis: Axis) -> None:
    """All-reduce the gradients of one dtype as one tensor, in place of the list."""
    for dtype in dict.fromkeys(g.dtype for g in grads if g is not None):
        chosen = [i for i, g in enumerate(grads) if g is not None and g.dtype == dtype]
        rows = [grads[i].shape[0] for i in chosen]  # type: ignore[union-attr]
        total = comm.all_reduce_(torch.cat([grads[i] for i in chosen]), axis)  # type: ignore[misc]
        for i, grad in zip(chosen, total.split(rows), strict=True):
            grads[i] = grad.clone() if len(chosen) > 1 else grad


def low_rank(x: Tensor, factor: Tensor, dropout: Dropout | None, part: int) -> Tensor:
    """``A x`` for an x that is not a block's gathered input (row linears, the head).

    Shapes:   x [..., f], A [r, f] -> [..., r] in A's dtype
    Forward, backward: no collective; what is partial is the caller's to sum
    Saves:    if A needs a gradient: x as it is (neither cast nor dropped), or what x is computed
              from; A

    ``x`` is part number ``part`` of what all ranks see, for the mask of the dropout in front of A.
    """
    return _LowRank.apply(saved_form(x), x, factor, dropout, part)


class _LowRank(Node):
    @staticmethod
    def forward(
        ctx: Any, form: Any, x: Tensor, factor: Tensor, dropout: Dropout | None, part: int
    ) -> Tensor:
        function, inputs = form
        ctx.dropout, ctx.part, ctx.function = dropout, part, function
        ctx.save_for_backward(factor, *(inputs if ctx.needs_input_grad[2] else ()))
        seen = x if dropout is None else dropout.part(x, part)
        return F.linear(seen.to(factor.dtype), _scaled(factor, dropout))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        factor, *inputs = ctx.saved_tensors
        dropout, part = ctx.dropout, ctx.part
        (du,) = grads
        dx = dfactor = None
        if ctx.needs_input_grad[1]:
            dx = du @ _scaled(factor, dropout)
            dx = dx if dropout is None else dropout.part(dx, part)
        if ctx.needs_input_grad[2]:
            x = restored(ctx.function, inputs)
            seen = x if dropout is None else dropout.part(x, part)
            flat = seen.reshape(-1, seen.shape[-1]).to(factor.dtype)
            dfactor = _scaled(du.reshape(-1, du.shape[-1]).t() @ flat, dropout)
        return None, dx, dfactor, None, None


def _scaled(x: Tensor, dropout: Dropout | None) -> Tensor:
    return x if dropout is None else x * dropout.scale
