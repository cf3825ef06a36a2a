"""Gated experts on tokens sorted by expert, split over tp by their features.

What is saved for backward is what an expert computes with and nothing that can be had again: not
the permuted copies of the tokens (their rows are picked from the block's input, which the block's
entry gathers again), not ``silu(gate) * up``, and not the experts' outputs. For that the routing
weight is applied before the down projection, ``w (W_down h) = W_down (w h)``, so that its gradient
``<dh', h>`` needs local features only.

Shape letters: T tokens, k experts a token, R = T * k rows, E experts, H hidden, f local features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sp.comm.autograd import once_differentiable
from hf_sp.kernels.swiglu import swiglu_backward, swiglu_forward
from hf_sp.moe.flat import FlatEntry
from hf_sp.moe.grouped import (
    Groups,
    grouped_input_gradient,
    grouped_linear,
    grouped_weight_gradient,
)


@dataclass(slots=True)
class Order:
    """Rows (token, choice) sorted by expert.

    Args:
        rows: ``[R']`` places in the flattened ``[T * k]`` routing tensors, sorted by expert.
        groups: where each expert's rows end.
        choices: k.
        tokens: T.
    """

    rows: Tensor
    groups: Groups
    choices: int
    tokens: int

    @classmethod
    def of(cls, index_Tk: Tensor, first: int, count: int) -> Order:
        """The rows of ``count`` experts from ``first`` on, then those of others.

        Nothing is read back from the device.
        """
        ids = index_Tk.reshape(-1) - first
        ids = torch.where((ids < 0) | (ids >= count), count, ids)
        ids, rows = torch.sort(ids, stable=True)
        experts = torch.arange(count, device=ids.device, dtype=ids.dtype)
        groups = Groups(torch.searchsorted(ids, experts, right=True).to(torch.int32))
        tokens, choices = index_Tk.shape
        return cls(rows, groups, choices, tokens)

    def counts(self) -> Tensor:
        """``[E]`` int64: rows of each expert."""
        ends = self.groups.ends.long()
        return torch.diff(ends, prepend=ends.new_zeros(1))

    def keep(self, rows: int) -> None:
        """Leave out the rows of others, once the number of the chosen is known."""
        self.rows = self.rows[:rows]

    def saved(self) -> tuple[Tensor, Tensor]:
        """What ``restore`` takes: half the size of int64 indices."""
        return self.rows.int(), self.groups.ends

    def restore(self, rows: Tensor, ends: Tensor) -> Order:
        """This order again, from saved tensors."""
        return Order(rows.long(), Groups(ends, self.groups.host), self.choices, self.tokens)

    def without_tensors(self) -> Order:
        """What autograd need not save: the numbers."""
        nothing = self.rows.new_empty(0)
        return Order(nothing, Groups(nothing, self.groups.host), self.choices, self.tokens)

    def pick(self, x_TH: Tensor) -> Tensor:
        """Each row's token, ``[R', H]``."""
        return x_TH.index_select(0, self.rows // self.choices)

    def sum_choices(self, y_RH: Tensor) -> Tensor:
        """``[T, H]``: each token's sum over its rows; rows that were left out count nothing.

        In the order of the choices, without atomics: the same bits each time.
        """
        all_rows = self.tokens * self.choices
        full = y_RH.new_empty if y_RH.shape[0] == all_rows else y_RH.new_zeros
        y = full(all_rows, y_RH.shape[1]).index_copy_(0, self.rows, y_RH)
        return y.view(self.tokens, self.choices, -1).sum(1)

    def spread(self, values_R: Tensor) -> Tensor:
        """``[T, k]`` of one value a row; zero where a row was left out."""
        full = values_R.new_zeros(self.tokens * self.choices)
        return full.index_copy_(0, self.rows, values_R).view(self.tokens, self.choices)


@dataclass(slots=True)
class Weights:
    """Local weights of the experts: gate_up ``[E, 2f, H]``, down ``[E, H, f]``."""

    gate_up: Tensor
    down: Tensor
    triton: bool


def experts_forward(
    x_RH: Tensor, scale_R: Tensor, weights: Weights, groups: Groups
) -> tuple[Tensor, Tensor]:
    """``W_down (w silu(gate) up)`` of sorted rows -> ``[R, H]``, and ``gate_up [R, 2f]``."""
    gate_up = grouped_linear(x_RH, weights.gate_up, groups)
    gate, up = gate_up.chunk(2, -1)
    product = swiglu_forward(gate, up, triton=weights.triton)
    scaled = (product * scale_R[:, None]).to(product.dtype)
    return grouped_linear(scaled, weights.down, groups), gate_up


def experts_backward(
    dy_RH: Tensor, gate_up: Tensor, scale_R: Tensor, weights: Weights, groups: Groups, down: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of ``experts_forward``.

    Args:
        dy_RH: gradient of the sorted rows' outputs.
        gate_up: what the forward has returned.
        scale_R: routing weights.
        weights: as in the forward.
        groups: as in the forward.
        down: whether the down projection needs a gradient.

    Returns:
        ``(d gate_up [R, 2f], d scale [R], d down [E, H, f] or None)``.
    """
    dscaled = grouped_input_gradient(dy_RH, weights.down, groups)
    dproduct = (dscaled * scale_R[:, None]).to(gate_up.dtype)
    gate, up = gate_up.chunk(2, -1)
    dgate, dup, product = swiglu_backward(dproduct, gate, up, product=True, triton=weights.triton)
    assert product is not None
    wide = torch.promote_types(product.dtype, torch.float32)
    dscale = (dscaled.to(wide) * product.to(wide)).sum(-1).to(scale_R.dtype)
    ddown = None
    if down:
        scaled = (product * scale_R[:, None]).to(product.dtype)
        ddown = grouped_weight_gradient(dy_RH, scaled, groups)
    return torch.cat([dgate, dup], -1), dscale, ddown


@dataclass(slots=True)
class Place:
    """How the gradients leave: through the block's entry, if x is what it gathered.

    Args:
        entry: the block's entry, None if x is something else.
        slot: the experts' slot there.
    """

    entry: FlatEntry | None = None
    slot: int = 0

    def leave(self, dx_TH: Tensor | Callable[[], Tensor], make: Callable[[Tensor], Tensor]) -> None:
        """Hand over the input gradient, and what makes gate_up's from the tokens ``[T, H]``.

        Args:
            dx_TH: the input gradient, or what waits for it.
            make: makes gate_up's.
        """
        assert self.entry is not None
        if isinstance(dx_TH, Tensor):
            self.entry.receive_rows(dx_TH)
        else:
            self.entry.receive_later(dx_TH)
        if self.entry.trains[self.slot]:
            self.entry.later.append((self.slot, make))


def local_experts(
    x_TH: Tensor,
    index_Tk: Tensor,
    scale_Tk: Tensor,
    weights: Weights,
    place: Place,
    first: int | None = None,
) -> Tensor:
    """This rank's part of the experts' output: of their features, or of the experts themselves.

    Shapes:   x [T, H], index and scale [T, k] -> [T, H] partial
    Forward:  no collective
    Backward: no collective; gradients of x and scale are partial, and x's leaves through the entry,
              which makes gate_up's gradient from the tokens it gathers again
    Saves:    gate and up [R, 2f], scale and 4 bytes for each row, the weights. If x did not come
              from the block's entry, x too

    Args:
        x_TH: the tokens.
        index_Tk: the experts of each.
        scale_Tk: their routing weights.
        weights: this rank's.
        place: where x comes from.
        first: number of this rank's first expert; None if it has a part of every expert. With a
            number, one synchronisation.
    """
    gate_up = weights.gate_up if place.entry is None else weights.gate_up.detach()
    return _LocalExperts.apply(
        x_TH, index_Tk, scale_Tk, gate_up, weights.down, place, first, weights.triton
    )


class _LocalExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        index_Tk: Tensor,
        scale_Tk: Tensor,
        gate_up: Tensor,
        down: Tensor,
        place: Place,
        first: int | None,
        triton: bool,
    ) -> Tensor:
        order = Order.of(index_Tk, first or 0, gate_up.shape[0])
        if first is not None:
            order.keep(order.groups.stretches()[-1][1])
        weights = Weights(gate_up, down, triton)
        scale = scale_Tk.reshape(-1)[order.rows]
        y, kept = experts_forward(order.pick(x_TH), scale, weights, order.groups)
        ctx.place, ctx.triton, ctx.order = place, triton, order.without_tensors()
        own = None if place.entry is not None else x_TH
        ctx.save_for_backward(kept, scale, gate_up, down, own, *order.saved())
        return order.sum_choices(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, scale, gate_up, down, x_TH, *rest = ctx.saved_tensors
        order = ctx.order.restore(*rest)
        weights = Weights(gate_up, down, ctx.triton)
        dy = order.pick(grads[0])
        dgate_up, dscale, ddown = experts_backward(
            dy, kept, scale, weights, order.groups, ctx.needs_input_grad[4]
        )
        dx = order.sum_choices(grouped_input_gradient(dgate_up, gate_up, order.groups))

        def make(x_TH: Tensor) -> Tensor:
            return grouped_weight_gradient(dgate_up, order.pick(x_TH), order.groups)

        dw = None
        if ctx.place.entry is not None:
            ctx.place.leave(dx, make)
            dx = None
        elif ctx.needs_input_grad[3]:
            dw = make(x_TH)
        return dx, None, order.spread(dscale), dw, ddown, None, None, None
