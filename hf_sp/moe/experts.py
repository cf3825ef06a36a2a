"""Gated experts on tokens sorted by expert, split over tp by their features.

What is saved for backward is what an expert computes with and nothing that can be had again: not
the permuted copies of the tokens (their rows are picked from the block's input, which the block's
entry gathers again), not ``silu(gate) * up``, and not the experts' outputs. For that the routing
weight is applied before the down projection, ``w (W_down h) = W_down (w h)``, so that its gradient
``<dh', h>`` needs local features only.

Shape letters: T tokens, k experts a token, R = T * k rows, E experts, H hidden, f local features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.kernels.reference import Gating
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


class Maths(NamedTuple):
    """What experts compute, besides their weights: layouts are those of ``plan.schema.Experts``."""

    gating: Gating
    triton: bool
    transposed: bool = False
    interleaved: bool = False
    adds_bias: bool = True  # of the down projection, whose outputs are summed over ranks


def experts_forward(
    x_RH: Tensor,
    scale_R: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: Sequence[Tensor | None],
    groups: Groups,
    maths: Maths,
) -> tuple[Tensor, Tensor]:
    """``w (W_down act(gate, up) + b)`` of sorted rows ``[R, H]``; and gate and up ``[R, 2f]``."""
    # The gradient's product is the one with a weight that lies transposed.
    linear = grouped_input_gradient if maths.transposed else grouped_linear
    both = linear(x_RH, gate_up, groups)
    if biases[0] is not None:
        both = both.add_(_of_rows(biases[0], groups, both))
    product = swiglu_forward(*_gate_and_up(both, maths), gating=maths.gating, triton=maths.triton)
    scaled = (product * scale_R[:, None]).to(product.dtype)
    y = linear(scaled, down, groups)
    if biases[1] is not None and maths.adds_bias:
        y = y.add_(_of_rows(biases[1], groups, y) * scale_R[:, None])
    return y, both


def experts_backward(
    dy_RH: Tensor,
    both: Tensor,
    scale_R: Tensor,
    down: Tensor,
    bias: Tensor | None,
    groups: Groups,
    maths: Maths,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``experts_forward``, but for the weights'; ``bias`` is the down projection's.

    Returns:
        d both ``[R, 2f]``, d scale ``[R]``, and the down projection's input ``[R, f]`` again.
    """
    dlinear = grouped_linear if maths.transposed else grouped_input_gradient
    dscaled = dlinear(dy_RH, down, groups)
    dproduct = (dscaled * scale_R[:, None]).to(both.dtype)
    gate, up = _gate_and_up(both, maths)
    dgate, dup, product = swiglu_backward(
        dproduct, gate, up, gating=maths.gating, product=True, triton=maths.triton
    )
    assert product is not None
    wide = torch.promote_types(product.dtype, torch.float32)
    dscale = (dscaled.to(wide) * product.to(wide)).sum(-1)
    if bias is not None and maths.adds_bias:
        dscale += (dy_RH.to(wide) * _of_rows(bias, groups, dy_RH)).sum(-1)
    scaled = (product * scale_R[:, None]).to(product.dtype)
    if maths.interleaved:
        dgate_up = torch.stack([dgate, dup], -1).flatten(-2)
    else:
        dgate_up = torch.cat([dgate, dup], -1)
    return dgate_up, dscale.to(scale_R.dtype), scaled


def _gate_and_up(both: Tensor, maths: Maths) -> tuple[Tensor, ...]:
    return (both[..., ::2], both[..., 1::2]) if maths.interleaved else both.chunk(2, -1)


def _of_rows(bias_Eo: Tensor, groups: Groups, rows: Tensor) -> Tensor:
    """Each row's expert's bias."""
    places = torch.arange(rows.shape[0], device=rows.device, dtype=groups.ends.dtype)
    experts = torch.searchsorted(groups.ends, places, right=True)
    # Past the end where tensors have no values.
    return bias_Eo.index_select(0, experts.clamp_(max=bias_Eo.shape[0] - 1))


def bias_gradient(dy_Ro: Tensor, weights_R: Tensor, groups: Groups) -> Tensor:
    """``[E, o]``: each expert's sum of its rows, weighted; without atomics."""
    column = weights_R.to(dy_Ro.dtype)[:, None]
    return grouped_weight_gradient(dy_Ro, column, groups).squeeze(-1)


def weight_gradient(dy_Ro: Tensor, x_Ri: Tensor, groups: Groups, transposed: bool) -> Tensor:
    """A grouped linear's, ``[E, o, i]``, or ``[E, i, o]`` if it lies transposed."""
    return grouped_weight_gradient(*((x_Ri, dy_Ro) if transposed else (dy_Ro, x_Ri)), groups)


def gate_up_gradient(
    dgate_up: Tensor,
    rows: Tensor,
    ends: Tensor,
    x_TH: Tensor,
    top_k: int,
    transposed: bool = False,
) -> Tensor:
    """The packed gate and up weight's gradient: ``gradient`` of ``model.columns.Experts``.

    Shapes:   dgate_up [R, 2f], rows [R] in [T * k] by expert, ends [E], x [T, H] -> [E, 2f, H], or
              [E, H, 2f]
    """
    x_RH = x_TH.index_select(0, rows // top_k)
    return weight_gradient(dgate_up, x_RH, Groups(ends), transposed)


def run_experts(
    x_TH: Tensor,
    scale_Tk: Tensor,
    gate_up: Tensor,
    down: Tensor,
    biases: Sequence[Tensor | None],
    dispatcher: Dispatcher,
    port: Port | None,
    maths: Maths,
) -> Tensor:
    """The experts' output for the tokens: this rank's part, or the whole, as they are dispatched.

    Shapes:   x [T, H], scale [T, k], gate_up [E, 2f, H], down [E, H, f], their biases [E, 2f],
              [E, H] or None -> [T, H]
    Forward:  nothing where no rows travel; else 3 all-to-all (rows, scales, outputs), and before
              that 1 of the counts
    Backward: 4 all-to-all: dy rows, the tokens' rows again (if gate_up is trained), dscale, dx rows
    Saves:    gate and up [R, 2f], scale and 4 bytes for each row, the weights. Without a port, and
              if gate_up is trained, also x or what it is computed from; with one, the block's entry
              has that

    ``port`` is of the block's entry, which makes gate_up's gradient from the tokens that it gathers
    again.
    """
    outputs = (None, None, None) if port is None else port.outputs
    form = saved_form(x_TH)
    tensors = x_TH, scale_Tk, gate_up, down, *biases
    return _Experts.apply(form, dispatcher, maths, *tensors, *outputs)


class _Experts(Node):
    @staticmethod
    def forward(ctx: Any, form: Any, dispatcher: Any, maths: Maths, *tensors: Any) -> Tensor:
        x_TH, scale_Tk, gate_up, down, *biases = tensors[:6]
        # Both are launched before the first is waited for.
        rows = dispatcher.launch_dispatch(dispatcher.permute(x_TH))
        scale = dispatcher.launch_dispatch(scale_Tk.reshape(-1).index_select(0, dispatcher.rows))
        scale, rows = dispatcher.land_dispatch(scale), dispatcher.land_dispatch(rows)
        y, both = experts_forward(rows, scale, gate_up, down, biases, dispatcher.groups, maths)
        ctx.function, inputs = form
        ctx.ported, ctx.maths = tensors[6] is not None, maths
        ctx.trains = ctx.needs_input_grad[5] and not ctx.ported
        nothing = x_TH.new_empty(0)
        ctx.dispatcher = dispatcher.with_tensors(nothing, nothing, None)
        tensors = dispatcher.rows.int(), dispatcher.groups.ends, dispatcher.places
        inputs = inputs if ctx.trains else ()
        ctx.save_for_backward(both, scale, gate_up, down, biases[1], *tensors, *inputs)
        return dispatcher.unpermute(dispatcher.land_combine(dispatcher.launch_combine(y)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        both, scale, gate_up, down, bias, *saved = ctx.saved_tensors
        dispatcher, inputs = ctx.dispatcher.with_tensors(*saved[:3]), saved[3:]
        groups, maths = dispatcher.groups, ctx.maths
        dy = dispatcher.launch_dispatch(dispatcher.permute(grads[0]))
        again = None
        if ctx.trains:
            again = dispatcher.launch_dispatch(dispatcher.permute(restored(ctx.function, inputs)))
        dy = dispatcher.land_dispatch(dy)
        dgate_up, dscale, scaled = experts_backward(dy, both, scale, down, bias, groups, maths)
        # The few numbers first: they are here when the products are done, and do not wait for dx.
        dscale = dispatcher.launch_combine(dscale)
        dx = dw = ddown = None
        if ctx.needs_input_grad[3]:
            dlinear = grouped_linear if maths.transposed else grouped_input_gradient
            dx = dispatcher.launch_combine(dlinear(dgate_up, gate_up, groups))
        # In flight beside the weights' gradients.
        if ctx.needs_input_grad[6]:
            ddown = weight_gradient(dy, scaled, groups, maths.transposed)
        dbiases: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[7]:
            dbiases[0] = bias_gradient(dgate_up, torch.ones_like(scale), groups)
        if ctx.needs_input_grad[8]:
            # Of all that is added, on a rank that does not add it too.
            dbiases[1] = bias_gradient(dy, scale, groups)
        if again is not None:
            again = dispatcher.land_dispatch(again)
            again = again.to(dgate_up.dtype)
            dw = weight_gradient(dgate_up, again, groups, maths.transposed)
        dscale = dispatcher.spread(dispatcher.land_combine(dscale))
        if dx is not None:
            dx = dispatcher.unpermute(dispatcher.land_combine(dx))
        ports: tuple[Tensor | None, ...] = (None, None, None)
        if ctx.ported:
            ports = dgate_up, dispatcher.rows.double(), groups.ends.double()
        return None, None, None, dx, dscale, dw, ddown, *dbiases, *ports
