"""The two ways in which a factor ``A`` is applied, each saving as little as it can.

See ``factors`` for the rule; shape letters as there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm import pairs
from hf_sp.comm.autograd import once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.model.columns import Entry
from hf_sp.model.entered import entered_slot
from hf_sp.model.factors import Dropout
from hf_sp.model.recompute import Recipe, recipe_of


def entry_factor(
    x: Tensor, key: int, factor: Tensor, dropout: Dropout | None, axis: Axis
) -> Tensor:
    """``A x`` of a factor that reads the tensor which ``enter_block`` has gathered.

    Shapes:   x [B, S, H], A [r, H] replicated -> u [B, S, r] in A's dtype, equal on all ranks
    Forward:  no collective
    Backward: none of its own (see ``enter_block``). On an x that did not come from the block's
              entry (changed on the way): 1 all-reduce of dA
    Saves:    A; on such an x also x

    Args:
        x: the block's input.
        key: what ``entry_factors`` called the factor.
        factor: A, as this forward uses it.
        dropout: what is dropped in front of it.
        axis: the tp axis.
    """
    found = entered_slot(x, key)
    if found is None:
        return factor_linear(x, pairs.identity_allreduce(factor, axis), dropout, 0)
    entry, slot = found
    known, _ = entry.parameters[slot]
    return _EntryFactor.apply(entry, slot, x, known.detach(), dropout)


class _EntryFactor(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, entry: Entry, slot: int, x: Tensor, factor: Tensor, dropout: Dropout | None
    ) -> Tensor:
        ctx.entry, ctx.slot, ctx.dropout = entry, slot, dropout
        ctx.save_for_backward(factor)
        seen = entry.buffer_order(x)
        if dropout is not None:
            seen = dropout.parts(seen, entry.axis.size if entry.sharded else 1)
        u = entry.buffer_order(F.linear(seen.to(factor.dtype), factor))
        return u.contiguous() if entry.batch_major else u

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (factor,) = ctx.saved_tensors
        ctx.entry.receive_factor(ctx.slot, grads[0], factor, ctx.dropout)
        return None, None, None, None, None


def factor_linear(x: Tensor, factor: Tensor, dropout: Dropout | None, part: int) -> Tensor:
    """``A x`` for an x that is not a block's gathered input (row linears, the head).

    Shapes:   x [..., f], A [r, f] -> [..., r] in A's dtype
    Forward, backward: no collective; what is partial is the caller's to sum
    Saves:    if A needs a gradient: x as it is (neither cast nor dropped), or what x is made of;
              A

    Args:
        x: the input.
        factor: A.
        dropout: what is dropped in front of it.
        part: which part of the whole input x is, for the mask.
    """
    return _FactorLinear.apply(recipe_of(x), x, factor, dropout, part)


class _FactorLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe | None,
        x: Tensor,
        factor: Tensor,
        dropout: Dropout | None,
        part: int,
    ) -> Tensor:
        ctx.dropout, ctx.part, ctx.make = dropout, part, None
        ingredients: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[2]:
            ctx.make = None if recipe is None else recipe.make
            ingredients = (x,) if recipe is None else recipe.ingredients
        ctx.save_for_backward(factor, *ingredients)
        seen = x if dropout is None else dropout.part(x, part)
        return F.linear(seen.to(factor.dtype), factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        factor, *ingredients = ctx.saved_tensors
        dropout, part = ctx.dropout, ctx.part
        (du,) = grads
        dx = dfactor = None
        if ctx.needs_input_grad[1]:
            dx = du @ factor
            dx = dx if dropout is None else dropout.part(dx, part)
        if ingredients:
            x = ingredients[0] if ctx.make is None else ctx.make(*ingredients)
            seen = x if dropout is None else dropout.part(x, part)
            flat = seen.reshape(-1, seen.shape[-1]).to(factor.dtype)
            dfactor = du.reshape(-1, du.shape[-1]).t() @ flat
        return None, dx, dfactor, None, None
