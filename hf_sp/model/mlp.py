"""Gated MLPs, ``down(act(gate(x)) * up(x))``, that save gate and up and not their product.

``SwiGLUForward`` hangs on the instance (``module.forward``). Under torch.compile, and where
somebody has hooks on the activation or has put another one there, the class's own forward runs.

Shape letters: B batch, S sequence, H hidden, f local intermediate features.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward
from hf_sp.model.linear import row_input_gradient, row_output, row_parameter_gradients
from hf_sp.model.recompute import Recompute, attach_recompute
from hf_sp.plan.known_forms import GatedForm


class SwiGLUForward:
    """A gated MLP's forward, with its fused product.

    Saves:    gate and up; the product too, unless ``recompute``
    """

    def __init__(
        self, module: nn.Module, form: GatedForm, *, recompute: bool, triton: bool
    ) -> None:
        self.module, self.form = module, form
        self.recompute, self.triton = recompute, triton
        self.gating = form.gating
        linears = {form.gate, form.up, form.down}
        # The activation, and whatever else is not called here.
        self.others = {k: m for k, m in module._modules.items() if k not in linears}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The MLP of one tensor."""
        module, form = self.module, self.form
        if len(args) != 1 or kwargs or self._watched():
            return type(module).forward(module, *args, **kwargs)
        gate = getattr(module, form.gate)(args[0])
        gate, up = (gate, getattr(module, form.up)(args[0])) if form.up else gate.chunk(2, -1)
        down = getattr(module, form.down)
        if torch.compiler.is_compiling():
            make = functools.partial(swiglu, gating=self.gating)
            if not self.recompute:
                return down(make(gate, up))
            # The partitioner would save what a matrix product of the backward reads.
            return down(checkpoint(make, gate, up, use_reentrant=False))
        how: dict[str, Any] = {"gating": self.gating, "triton": self.triton}
        product = swiglu(gate, up, **how)
        # A hook that runs behind it is shown the product, and may watch its gradient.
        if self.recompute and torch.is_grad_enabled() and not _has_forward_hooks(down):
            again = functools.partial(swiglu_forward, **how)
            row_linear = functools.partial(SwiGLURowLinear.apply, how)
            attach_recompute(product, Recompute(again, (gate, up), row_linear))
        return down(product)

    def _watched(self) -> bool:
        """Whether someone has put another activation here, or hooks on it."""
        for name, child in self.others.items():
            if self.module._modules.get(name) is not child:
                return True
            if child is not None and (
                child._forward_hooks
                or child._forward_pre_hooks
                or child._backward_hooks
                or child._backward_pre_hooks
            ):
                return True
        return False


def _has_forward_hooks(module: nn.Module) -> bool:
    # An adapter holds the linear inside.
    if module._forward_hooks:
        return True
    return any(_has_forward_hooks(m) for m in module._modules.values() if m is not None)


class SwiGLURowLinear(Node):
    """``(act(gate) * up) W^T`` without saving the product.

    The backward makes the product in the pass that makes the gradients of gate and up: the weight
    gradient needs it there, and nowhere else.

    Shapes:   gate, up, product [B, S, f], weight [H, f] -> as ``RowLinear``
    Forward, backward: no collective; the product comes ready-made
    Saves:    gate, up, the weight
    """

    @staticmethod
    def forward(
        ctx: Any,
        how: dict[str, Any],
        gate: Tensor,
        up: Tensor,
        product: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        add_bias: bool,
        height: int,
    ) -> Tensor:
        """Apply the weight to the product."""
        ctx.how = how
        y, weight = row_output(ctx, product, weight, bias, add_bias, height)
        ctx.save_for_backward(gate, up, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of gate, up, weight and bias."""
        gate, up, weight = ctx.saved_tensors
        _, needs_gate, needs_up, _, needs_weight, needs_bias = ctx.needs_input_grad[:6]
        dproduct = row_input_gradient(ctx, grads[0], weight)
        dgate, dup, product = swiglu_backward(dproduct, gate, up, product=needs_weight, **ctx.how)
        del dproduct
        inputs = dgate if needs_gate else None, dup if needs_up else None
        parameters = row_parameter_gradients(ctx, grads[0], product, needs_bias)
        return None, *inputs, None, *parameters, None, None
