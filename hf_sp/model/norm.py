"""Norms whose arithmetic is known: fused forward and backward, and what they need of the ranks.

``NormForward`` hangs on the instance (``module.forward``). Under torch.compile, and for an argument
or a setting that it does not know, the class's own forward runs.

Shape letters: H features of a row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.kernels.norm import rms_norm_backward, rms_norm_forward
from hf_sp.model.local import check_gathered
from hf_sp.model.parameters import LocalParameters, sum_together
from hf_sp.model.recompute import Recompute, attach_recompute
from hf_sp.plan.known_forms import NormForm
from hf_sp.torch_private import pack, unpack


class RmsNorm(Node):
    """An RMS norm of rows.

    Shapes:   x [..., H], weight [H] -> [..., H], the dtype that the module itself would return
    Forward:  no collective
    Backward: no collective; a port is sent the partial gradient in float32
    Saves:    x, one float32 a row, the weight
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, port: Tensor | None, maths: dict[str, Any]
    ) -> Tensor:
        """Normalise."""
        ctx.maths, ctx.to_port = maths, port is not None
        (weight,), ctx.specs = unpack((weight,))
        y, rstd = rms_norm_forward(x, weight, **maths)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x and the weight."""
        x, rstd, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_port = ctx.needs_input_grad[:3]
        needs_weight = needs_port if ctx.to_port else needs_weight
        dx, dw = rms_norm_backward(
            grads[0], x, rstd, weight, need_dx=needs_x, need_dw=needs_weight, **ctx.maths
        )
        if ctx.to_port:
            return dx, None, dw, None
        dw = None if dw is None else dw.to(weight.dtype)
        return dx, *pack((dw,), ctx.specs), None, None


class NormForward:
    """``RmsNorm`` in place of a norm's own forward.

    ``parameters`` knows when the weight's gradient is partial, and where it is summed.
    ``recompute``: what follows saves x instead of the output.
    """

    def __init__(
        self,
        module: nn.Module,
        form: NormForm,
        parameters: LocalParameters,
        *,
        recompute: bool,
        triton: bool,
    ) -> None:
        self.module, self.form, self.parameters = module, form, parameters
        self.recompute = recompute
        self.maths: dict[str, Any] = {
            "eps": form.eps,
            "offset": form.offset,
            "casting": form.casting,
            "triton": triton,
        }
        # The attributes that hold eps: who sets another value later means it.
        self.settings = [(k, v) for k, v in vars(module).items() if isinstance(v, float)]
        # Of the form alone: it lives in the autograd graph and must not hold the module.
        self.again = functools.partial(_norm_again, **self.maths)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The norm of one tensor."""
        module = self.module
        if torch.compiler.is_compiling() or not self._known(args, kwargs):
            forward = type(module).forward
            self.parameters.show(module, args)
            try:
                if not self.recompute or not torch.compiler.is_compiling():
                    return forward(module, *args, **kwargs)
                # The partitioner would save what a collective of the backward reads.
                return checkpoint(forward, module, *args, use_reentrant=False, **kwargs)
            finally:
                self.parameters.hide(module, args, None)
        x, weight = args[0], module._parameters["weight"]
        assert weight is not None
        if isinstance(weight, DTensor):
            check_gathered(weight)
        port = self.parameters.ports.get("weight")
        if port is None and weight.requires_grad and self.parameters.summed():
            # No layer's norm: the final one.
            port = sum_together(self.parameters.state.axis, weight)[0]
        y = RmsNorm.apply(x, weight, port, self.maths)
        # A forward hook may change y through ``.data`` without a trace: y itself is saved then.
        if self.recompute and torch.is_grad_enabled() and not module._forward_hooks:
            attach_recompute(y, Recompute(self.again, (x, unpack((weight,))[0][0])))
        return y

    def _known(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return False
        for name, value in self.settings:
            if self.module.__dict__.get(name) != value:
                return False
        return self.form.float64 or args[0].dtype != torch.float64


def _norm_again(x: Tensor, weight: Tensor, **maths: Any) -> Tensor:
    return rms_norm_forward(x, weight, **maths)[0]
