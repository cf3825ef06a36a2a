"""RMS norms over the features of all heads, of which each rank has its own.

Shape letters: B batch, S sequence, N features of all heads, n this rank's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.model.local import local
from hf_sp.plan.known_forms import NormForm, norm_form


class _OverHeads(Node):
    """An RMS norm of rows whose features are spread over the ranks.

    Shapes:   x [B, S, n], weight [n] -> [B, S, n], the dtype that the module itself would return
    Forward:  1 all-reduce of [B, S] sums of squares
    Backward: 1 all-reduce of [B, S] sums; the weight's gradient is this rank's, whole
    Saves:    x, one float32 a row, the weight
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, form: NormForm, axis: Axis) -> Tensor:
        ctx.form, ctx.axis = form, axis
        wide = x.float()
        square = comm.all_reduce(wide.pow(2).sum(-1, keepdim=True), axis)
        rstd = torch.rsqrt(square / (x.shape[-1] * axis.size) + form.eps)
        ctx.save_for_backward(x, rstd, weight)
        y = wide * rstd
        if form.casting == "llama":
            return weight * y.to(x.dtype)
        return ((form.offset + weight.float() if form.offset else weight) * y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, rstd, weight = ctx.saved_tensors
        form: NormForm = ctx.form
        dy, normed = grads[0].float(), x.float() * rstd
        seen = normed.to(x.dtype).float() if form.casting == "llama" else normed
        dw = (dy * seen).flatten(0, -2).sum(0).to(weight.dtype)
        dy = dy * (form.offset + weight.float())
        mean = comm.all_reduce((dy * normed).sum(-1, keepdim=True), ctx.axis)
        dx = rstd * (dy - normed * (mean / (x.shape[-1] * ctx.axis.size)))
        return dx.to(x.dtype), dw, None, None


class OverHeadsForward:
    """``_OverHeads`` in place of a norm's own forward; hangs on the instance."""

    def __init__(self, module: nn.Module, form: NormForm, axis: Axis) -> None:
        self.module, self.form, self.axis = module, form, axis

    @classmethod
    def install(cls, module: nn.Module, axis: Axis) -> None:
        """Replace the forward of a norm whose form is known."""
        form = norm_form(module)
        assert form is not None
        setattr(module, "forward", cls(module, form, axis))  # noqa: B010 (a method to mypy)

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of this rank's features."""
        weight: Any = self.module._parameters["weight"]
        return _OverHeads.apply(x, local(weight), self.form, self.axis)
