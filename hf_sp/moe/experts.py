"""Gated experts on tokens sorted by expert, split over tp by their features.

What is saved for backward is what an expert computes with and nothing that can be had again: not
the permuted copies of the tokens (their rows are picked from the block's input, which the block's
entry gathers again), not ``silu(gate) * up``, and not the experts' outputs. For that the routing
weight is applied before the down projection, ``w (W_down h) = W_down (w h)``, so that its gradient
``<dh', h>`` needs local features only.

Shape letters: T tokens, k experts a token, R = T * k rows, E experts, H hidden, f local features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.kernels.swiglu import swiglu_backward, swiglu_forward
from hf_sp.model.ports import Port
from hf_sp.model.recompute import restored, saved_form
from hf_sp.moe.dispatcher import Dispatcher
from hf_sp.moe.grouped import (
    Groups,
    grouped_input_gradient,
    grouped_linear,
    grouped_weight_gradient,
)


def experts_forward(
    x_RH: Tensor, scale_R: Tensor, gate_up: Tensor, down: Tensor, groups: Groups, triton: bool
) -> tuple[Tensor, Tensor]:
    """``W_down (w silu(gate) up)`` of sorted rows -> ``[R, H]``; and gate and up ``[R, 2f]``."""
    both = grouped_linear(x_RH, gate_up, groups)
    product = swiglu_forward(*both.chunk(2, -1), triton=triton)
    scaled = (product * scale_R[:, None]).to(product.dtype)
    return grouped_linear(scaled, down, groups), both


def experts_backward(
    dy_RH: Tensor, both: Tensor, scale_R: Tensor, down: Tensor, groups: Groups, triton: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``experts_forward``, but for the weights'.

    Returns:
        d both ``[R, 2f]``, d scale ``[R]``, and the down projection's input ``[R, f]`` again.
    """
    dscaled = grouped_input_gradient(dy_RH, down, groups)
    dproduct = (dscaled * scale_R[:, None]).to(both.dtype)
    gate, up = both.chunk(2, -1)
    dgate, dup, product = swiglu_backward(dproduct, gate, up, product=True, triton=triton)
    assert product is not None
    wide = torch.promote_types(product.dtype, torch.float32)
    dscale = (dscaled.to(wide) * product.to(wide)).sum(-1).to(scale_R.dtype)
    scaled = (product * scale_R[:, None]).to(product.dtype)
    return torch.cat([dgate, dup], -1), dscale, scaled


def gate_up_gradient(
    dgate_up: Tensor, rows: Tensor, ends: Tensor, x_TH: Tensor, top_k: int
) -> Tensor:
    """The packed gate and up weight's gradient: ``gradient`` of ``model.columns.Experts``.

    Shapes:   dgate_up [R, 2f], rows [R] in [T * k] by expert, ends [E], x [T, H] -> [E, 2f, H]
    """
    return grouped_weight_gradient(dgate_up, x_TH.index_select(0, rows // top_k), Groups(ends))


def run_experts(
    x_TH: Tensor,
    scale_Tk: Tensor,
    gate_up: Tensor,
    down: Tensor,
    dispatcher: Dispatcher,
    port: Port | None,
    *,
    triton: bool,
) -> Tensor:
    """The experts' output for the tokens: this rank's part, or the whole, as they are dispatched.

    Shapes:   x [T, H], scale [T, k], gate_up [E, 2f, H], down [E, H, f] -> [T, H]
    Forward:  nothing where no rows travel; else 3 all-to-all (rows, scales, outputs), and before
              that 1 of the counts
    Backward: 4 all-to-all: dy rows, the tokens' rows again (if gate_up is trained), dscale, dx rows
    Saves:    gate and up [R, 2f], scale and 4 bytes for each row, the weights. Without a port, and
              if gate_up is trained, also x or what it is computed from; with one, the block's entry
              has that

    ``port`` is of the block's entry, which makes gate_up's gradient from the tokens that it gathers
    again. ``triton``: run Triton kernels.
    """
    outputs = (None, None, None) if port is None else port.outputs
    form = saved_form(x_TH)
    return _Experts.apply(form, dispatcher, triton, x_TH, scale_Tk, gate_up, down, *outputs)


class _Experts(Node):
    @staticmethod
    def forward(ctx: Any, form: Any, dispatcher: Any, triton: bool, *tensors: Any) -> Tensor:
        x_TH, scale_Tk, gate_up, down, *ports = tensors
        # Both are launched before the first is waited for.
        rows = dispatcher.launch_dispatch(dispatcher.permute(x_TH))
        scale = dispatcher.launch_dispatch(scale_Tk.reshape(-1).index_select(0, dispatcher.rows))
        scale, rows = dispatcher.land_dispatch(scale), dispatcher.land_dispatch(rows)
        y, both = experts_forward(rows, scale, gate_up, down, dispatcher.groups, triton)
        ctx.function, inputs = form
        ctx.ported, ctx.triton = ports[0] is not None, triton
        ctx.trains = ctx.needs_input_grad[5] and not ctx.ported
        nothing = x_TH.new_empty(0)
        ctx.dispatcher = dispatcher.with_tensors(nothing, nothing, None)
        tensors = dispatcher.rows.int(), dispatcher.groups.ends, dispatcher.places
        inputs = inputs if ctx.trains else ()
        ctx.save_for_backward(both, scale, gate_up, down, *tensors, *inputs)
        return dispatcher.unpermute(dispatcher.land_combine(dispatcher.launch_combine(y)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        both, scale, gate_up, down, *saved = ctx.saved_tensors
        dispatcher, inputs = ctx.dispatcher.with_tensors(*saved[:3]), saved[3:]
        groups = dispatcher.groups
        dy = dispatcher.launch_dispatch(dispatcher.permute(grads[0]))
        again = None
        if ctx.trains:
            again = dispatcher.launch_dispatch(dispatcher.permute(restored(ctx.function, inputs)))
        dy = dispatcher.land_dispatch(dy)
        dgate_up, dscale, scaled = experts_backward(dy, both, scale, down, groups, ctx.triton)
        # The few numbers first: they are here when the products are done, and do not wait for dx.
        dscale = dispatcher.launch_combine(dscale)
        dx = dw = ddown = None
        if ctx.needs_input_grad[3]:
            dx = dispatcher.launch_combine(grouped_input_gradient(dgate_up, gate_up, groups))
        # In flight beside the weights' gradients.
        if ctx.needs_input_grad[6]:
            ddown = grouped_weight_gradient(dy, scaled, groups)
        if again is not None:
            again = dispatcher.land_dispatch(again)
            dw = grouped_weight_gradient(dgate_up, again.to(dgate_up.dtype), groups)
        dscale = dispatcher.spread(dispatcher.land_combine(dscale))
        if dx is not None:
            dx = dispatcher.unpermute(dispatcher.land_combine(dx))
        ports: tuple[Tensor | None, ...] = (None, None, None)
        if ctx.ported:
            ports = dgate_up, dispatcher.rows.double(), groups.ends.double()
        return None, None, None, dx, dscale, dw, ddown, *ports
