"""Row linears: of any input, and of a gated MLP over gate and up instead of their product.

Shape letters: B batch, S sequence, H hidden, f local intermediate features.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm.autograd import once_differentiable
from hf_sp.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward
from hf_sp.model.recompute import Recipe, leave_recipe


@dataclass(frozen=True, slots=True)
class GatedProduct(Recipe):
    """``silu(gate) * up``; the ingredients are gate and up."""

    triton: bool


def gated_product(gate: Tensor, up: Tensor, *, triton: bool, recompute: bool) -> Tensor:
    """``silu(gate) * up``, with its recipe if ``recompute``.

    Shapes:   gate, up [B, S, f] -> [B, S, f]
    Saves:    gate, up
    """
    product = swiglu(gate, up, triton=triton)
    if recompute:
        make = functools.partial(swiglu_forward, triton=triton)
        leave_recipe(product, GatedProduct(make, (gate, up), triton))
    return product


class GatedRowLinear(torch.autograd.Function):
    """``(silu(gate) * up) W^T`` without saving the product.

    The backward makes the product in the pass that makes the gradients of gate and up: the weight
    gradient needs it there, and nowhere else.

    Shapes:   gate, up, product [B, S, f], weight [H, f] -> [B, S, H] partial
    Forward:  no collective; the product comes ready-made
    Backward: no collective
    Saves:    gate, up, the weight
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        product: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        add_bias: bool,
        sharded: bool,
        triton: bool,
    ) -> Tensor:
        """Apply the weight to the product."""
        ctx.sharded, ctx.triton = sharded, triton
        ctx.save_for_backward(gate, up, weight)
        # The reduce-scatter wants [S, B, H]: permute the 1/tp-size input, not the full-size output.
        x = product.transpose(0, 1) if sharded else product
        y = F.linear(x, weight, bias if add_bias else None)
        return y.transpose(0, 1) if sharded else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of gate, up, weight and bias."""
        gate, up, weight = ctx.saved_tensors
        needs_gate, needs_up, _, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        dw = db = None
        dy = grads[0].transpose(0, 1) if ctx.sharded else grads[0]
        dy_TH = dy.reshape(-1, dy.shape[-1])
        dproduct = (dy_TH @ weight).view(*dy.shape[:-1], -1)
        dproduct = dproduct.transpose(0, 1) if ctx.sharded else dproduct
        dgate, dup, product = swiglu_backward(
            dproduct, gate, up, product=needs_weight, triton=ctx.triton
        )
        del dproduct
        if product is not None:
            product = product.transpose(0, 1) if ctx.sharded else product
            dw = dy_TH.t() @ product.reshape(-1, product.shape[-1])
        if needs_bias:
            db = dy_TH.sum(0)
        return (
            dgate if needs_gate else None,
            dup if needs_up else None,
            None,
            dw,
            db,
            None,
            None,
            None,
        )


class RowLinear(torch.autograd.Function):
    """``x W^T``, laid out for the reduce-scatter that follows.

    Shapes:   x [..., f], weight [H, f] -> [..., H] partial
    Forward:  no collective
    Backward: no collective
    Saves:    x if the weight needs a gradient, the weight
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add_bias: bool, sharded: bool
    ) -> Tensor:
        """Apply the weight."""
        ctx.sharded = sharded
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        # The reduce-scatter wants [S, B, H]: permute the 1/tp-size input, not the full-size output.
        y = F.linear(x.transpose(0, 1) if sharded else x, weight, bias if add_bias else None)
        return y.transpose(0, 1) if sharded else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        # Same token order on both sides of the products; sequence-major costs no full-size copy.
        dy = grads[0].transpose(0, 1) if ctx.sharded else grads[0]
        dy_TH = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = (dy_TH @ weight).view(*dy.shape[:-1], -1)
            dx = dx.transpose(0, 1) if ctx.sharded else dx
        if ctx.needs_input_grad[1]:
            x = x.transpose(0, 1) if ctx.sharded else x
            dw = dy_TH.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            db = dy_TH.sum(0)
        return dx, dw, db, None, None
