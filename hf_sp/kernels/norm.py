"""RMSNorm: the public function, and its passes for others' autograd Functions.

Must not know how the kernels work, modules, or ranks: a caller sums the weight's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hf_sp.kernels.launch as dispatch
import hf_sp.kernels.reference as reference
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.errors import ConfigError, ShapeError
from hf_sp.kernels.blocks import by_blocks
from hf_sp.kernels.reference import CASTINGS, Casting


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    triton: bool = True,
) -> Tensor:
    """RMSNorm over the last dimension, as Hugging Face's modules compute it.

    ``y = x * rsqrt(mean(x^2) + eps) * (offset + weight)``, statistics and products in float32 (for
    float64 input too, as there). The casting modes:

    ========== ===================================================== ====================
    casting    rounding                                              dtype of y
    ========== ===================================================== ====================
    llama      to x's dtype before the weight, and after it          promote(x, weight)
    gemma      once, after multiplying with ``offset + weight``      x's
    gpt_oss    the same (Hugging Face's source differs, only the     x's
               float64 bits show it)
    ========== ===================================================== ====================

    Shapes: x ``[..., N]``, weight ``[N]`` -> y ``[..., N]`` with x's memory layout; rows may be
    tokens or heads (q_norm). A slice of a fused projection and sequence-major memory are read where
    they lie.

    Saved for backward: x, rstd (float32, one number per row) and the weight. Backward works in
    float32 and rounds once, so it is closer to the true gradient than autograd over the modules'
    operations; it never writes into the incoming gradient, uses no atomics, and gives the same bits
    every time on one kind of device. Not differentiable twice. No collective. Under torch.compile
    these are the plain torch operations, which trace.

    Args:
        x: ``[..., N]``, a floating dtype.
        weight: ``[N]``, or None for a norm without one.
        eps: added to the mean square.
        offset: added to the weight in float32; 1.0 for Gemma. The llama form has none.
        casting: where it rounds, see the table.
        triton: False keeps to torch operations.

    Raises:
        ConfigError: casting, eps or offset cannot be worked with.
        ShapeError: shapes, dtypes or devices do not fit.
    """
    _check(x, weight, eps, offset, casting)
    if torch.compiler.is_compiling():
        return reference.rms_norm(x, weight, eps, offset, casting)[0]
    options = {"offset": offset, "casting": casting, "triton": triton}
    return RmsNorm.apply(x, weight, eps, options)


def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    triton: bool = True,
) -> tuple[Tensor, Tensor]:
    """The forward pass, unchecked, for where autograd does not record: arguments of ``rms_norm``.

    Returns:
        ``(y [..., N], rstd [...] in float32)``; y is bit-equal to :func:`rms_norm`'s.
    """
    kernels = dispatch.norm_kernels(x, weight) if triton else None
    if kernels is not None:
        return kernels.rms_norm(x, weight, eps, offset, casting)
    y, rstd = by_blocks(lambda x: reference.rms_norm(x, weight, eps, offset, casting), x)
    return y, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    need_dx: bool = True,
    need_dw: bool = True,
    triton: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """The backward pass, unchecked, for where autograd does not record: dy is left as it is.

    ``rstd [...]`` is the forward's, and the other arguments as they were there.

    Returns:
        ``(dx in x.dtype, dw [N], not rounded yet)``: dw in float32, in float64 where float64 is
        involved. None for what is not needed.
    """
    need_dw = need_dw and weight is not None
    if x.dtype == torch.float64 or (weight is not None and weight.dtype == torch.float64):
        return reference.rms_norm_backward_float64(
            dy, x, weight, eps, offset, casting, need_dx, need_dw
        )
    kernels = dispatch.norm_kernels(x, weight, dy, backward=True) if triton else None
    if kernels is not None:
        return kernels.rms_norm_backward(dy, x, rstd, weight, offset, casting, need_dx, need_dw)

    def block(x: Tensor, rstd: Tensor, dy: Tensor) -> tuple:
        return reference.rms_norm_backward(dy, x, rstd, weight, offset, casting, need_dx, need_dw)

    dx, dw = by_blocks(block, x, rstd, dy, summed=1)
    return dx, dw


class RmsNorm(Node):
    """Autograd's view of :func:`rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, options: dict) -> Tensor:
        """Compute y."""
        ctx.eps, ctx.options = eps, options
        y, rstd = rms_norm_forward(x, weight, eps, **options)
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x and the weight."""
        x, rstd, weight = ctx.saved_tensors
        need_dx, need_dw, *_ = ctx.needs_input_grad
        dx, dw = rms_norm_backward(
            grads[0], x, rstd, weight, ctx.eps, need_dx=need_dx, need_dw=need_dw, **ctx.options
        )
        return dx, None if dw is None else dw.to(weight.dtype), None, None


def _check(x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str) -> None:
    where = "hf_sp.kernels.rms_norm"
    if casting not in CASTINGS:
        raise ConfigError(
            "rms_norm does not know this casting.",
            where=f"{where}(casting=)",
            got=repr(casting),
            legal=", ".join(CASTINGS),
        )
    if casting == "llama" and offset:
        raise ConfigError(
            "The llama form of RMSNorm has no offset.",
            where=f"{where}(offset=)",
            got=f"offset={offset} with casting='llama'",
            rule="no model rounds before it multiplies with offset + weight",
            legal="offset=0.0, or casting='gemma'",
        )
    if not eps >= 0:
        raise ConfigError(
            "rms_norm needs an eps that keeps the root real.",
            where=f"{where}(eps=)",
            got=repr(eps),
            legal="a number >= 0",
        )
    if not x.is_floating_point() or x.dim() == 0:
        raise ShapeError(
            "rms_norm works on rows of floating point numbers.",
            where=f"{where}(x)",
            got=f"{list(x.shape)} {x.dtype}",
            legal="[..., N] in float32, bfloat16, float16 or float64",
        )
    if weight is not None and (
        weight.shape != x.shape[-1:] or weight.device != x.device or not weight.is_floating_point()
    ):
        raise ShapeError(
            "This weight does not fit the rows that are to be normalised.",
            where=f"{where}(weight)",
            got=f"{list(weight.shape)} {weight.dtype} on {weight.device}",
            rule="one floating point weight per element of x's last dimension, on x's device",
            legal=f"[{x.shape[-1]}] on {x.device}, or None",
        )
