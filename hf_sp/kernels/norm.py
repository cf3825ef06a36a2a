"""RMSNorm, with the residual sum in front of it where there is one.

Owns the public function and its autograd pair. Must not know how the
kernels work, modules, or ranks: the sum of weight gradients over ranks is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor

from hf_sp.comm.autograd import once_differentiable
from hf_sp.kernels import launch as dispatch
from hf_sp.kernels import reference
from hf_sp.kernels.arguments import check_norm, check_out
from hf_sp.kernels.blocks import Results, by_blocks
from hf_sp.kernels.reference import Casting, rms_norm_dtype

Reduce = Callable[[Tensor], Tensor]


class _Call(NamedTuple):
    """What is no input to autograd; ``out`` among it, which must not look like one."""

    eps: float
    offset: float
    casting: Casting
    out: Tensor | None
    reduce: Reduce | None
    triton: bool


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: None = None,
    offset: float = ...,
    casting: Casting = ...,
    out: Tensor | None = ...,
    reduce: Reduce | None = ...,
    triton: bool = ...,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor,
    offset: float = ...,
    casting: Casting = ...,
    out: Tensor | None = ...,
    reduce: Reduce | None = ...,
    triton: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    offset: float = 0.0,
    casting: Casting = "llama",
    out: Tensor | None = None,
    reduce: Reduce | None = None,
    triton: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension, as Hugging Face's modules compute it.

    ``s = x`` or ``round(residual + x)``; ``y = s * rsqrt(mean(s^2) + eps) * (offset + weight)``,
    statistics and products in float32 (for float64 input too, as there). The casting modes:

    ========== ===================================================== ====================
    casting    rounding                                              dtype of y
    ========== ===================================================== ====================
    llama      to x's dtype before the weight, and after it          promote(x, weight)
    gemma      once, after multiplying with ``offset + weight``      x's
    gpt_oss    the same (Hugging Face's source differs, only the     x's
    and olmo2  float64 bits show it)
    ========== ===================================================== ====================

    Shapes: x and residual ``[..., N]``, weight ``[N]``; rows may be tokens or heads (q_norm). A
    slice of a fused projection and sequence-major memory are read where they lie. y has x's memory
    layout.

    Saved for backward: s (x itself, or the sum, which the caller keeps as the residual stream
    anyway), rstd (float32, one number per row) and the weight. Backward works in float32 and rounds
    once, so it is closer to the true gradient than autograd over the modules' operations; it never
    writes into the incoming gradient, uses no atomics, and gives the same bits every time on one
    kind of device. Not differentiable twice.

    Under torch.compile these are the plain torch operations, which trace; y then has memory of its
    own, and ``out`` gets a copy.

    Args:
        x: ``[..., N]``, a floating dtype.
        weight: ``[N]``, or None for a norm without one.
        eps: added to the mean square.
        residual: ``[..., N]``, added to x first.
        offset: added to the weight in float32; 1.0 for Gemma. The llama form has none.
        casting: where it rounds, see the table.
        out: memory for y, of its shape and dtype, typically a slice of a gather buffer. It must not
            require a gradient or overlap the inputs. The tensor returned lies over it, and carries
            the gradient.
        reduce: applied to the float32 weight gradient (float64 for float64) before it is rounded
            to the weight's dtype: the sum over the ranks that hold the other rows. Not called for
            a frozen weight.
        triton: False keeps to torch operations.

    Returns:
        ``y [..., N]``; with a residual ``(y, s)``.

    Raises:
        ConfigError: casting, eps, offset or out cannot be worked with.
        ShapeError: shapes, dtypes or devices do not fit.
    """
    check_norm(x, weight, eps, residual, offset, casting)
    if out is not None:
        check_out(out, x, weight, residual, casting)
    if torch.compiler.is_compiling():
        return _traced(x, weight, residual, _Call(eps, offset, casting, out, reduce, False))
    call = _Call(eps, offset, casting, out, reduce, triton)
    y, s = RmsNorm.apply(x, residual, weight, call)
    return y if residual is None else (y, s)


def rms_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    out: Tensor | None = None,
    triton: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`rms_norm` without autograd, to compute y again in someone else's backward.

    Args:
        x: ``[..., N]``.
        weight: ``[N]`` or None.
        eps: added to the mean square.
        offset: see :func:`rms_norm`, like the next.
        casting: where it rounds.
        out: memory for y; not checked, see :func:`rms_norm` for what it must be.
        triton: False keeps to torch operations.

    Returns:
        ``(y [..., N], rstd [...] in float32)``; y is bit-equal to :func:`rms_norm`'s.
    """
    with torch.no_grad():
        y, _, rstd = _forward(x, None, weight, _Call(eps, offset, casting, out, None, triton))
    return y, rstd


def add_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    offset: float = 0.0,
    casting: Casting = "llama",
    triton: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`rms_norm` of ``residual + x`` without autograd.

    Args:
        x: ``[..., N]``.
        residual: ``[..., N]``.
        weight: ``[N]`` or None.
        eps: added to the mean square.
        offset: see :func:`rms_norm`, like the next.
        casting: where it rounds.
        triton: False keeps to torch operations.

    Returns:
        ``(y [..., N], s [..., N], rstd [...] in float32)``.
    """
    with torch.no_grad():
        return _forward(x, residual, weight, _Call(eps, offset, casting, None, None, triton))


class RmsNorm(torch.autograd.Function):
    """Autograd's view of :func:`rms_norm`. Saves s, rstd and the weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, call: _Call
    ) -> tuple[Tensor, Tensor | None]:
        """Compute ``(y, s or None)``; arguments as in :func:`rms_norm`."""
        ctx.set_materialize_grads(False)
        ctx.call = call._replace(out=None)  # the buffer must not live as long as the graph
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        y, s, rstd = _forward(x, residual, weight, call)
        ctx.save_for_backward(s, rstd, weight)
        return y, None if residual is None else s

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, ds: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Gradients of x, the residual and the weight."""
        need_x, need_residual, need_weight, _ = ctx.needs_input_grad
        dx, dw = ds, None
        if dy is not None:
            s, rstd, weight = ctx.saved_tensors
            call: _Call = ctx.call
            dx, dw = rms_norm_backward(
                dy,
                ds,
                s,
                rstd,
                weight,
                call.eps,
                offset=call.offset,
                casting=call.casting,
                need_dx=need_x or need_residual,
                need_dw=need_weight,
                triton=call.triton,
            )
            if dw is not None:
                dw = (dw if call.reduce is None else call.reduce(dw)).to(weight.dtype)
        x_dtype, residual_dtype = ctx.dtypes
        return (
            dx.to(x_dtype) if need_x and dx is not None else None,
            dx.to(residual_dtype) if need_residual and dx is not None else None,
            dw,
            None,
        )


def rms_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
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
    """Gradients of :func:`rms_norm`, without autograd and without the sum over ranks.

    Args:
        dy: gradient of y, ``[..., N]``; left as it is.
        ds: gradient of s from the residual stream, or None.
        s: the norm's input, ``[..., N]``.
        rstd: ``[...]`` in float32, from the forward.
        weight: ``[N]`` or None.
        eps: as in the forward, like the next two.
        offset: see :func:`rms_norm`.
        casting: see :func:`rms_norm`.
        need_dx: whether the gradient of s is wanted.
        need_dw: whether the gradient of the weight is wanted.
        triton: False keeps to torch operations.

    Returns:
        ``(dx in s.dtype, dw [N], not rounded yet)``: dw in float32, in float64 where float64 is
        involved. None for what is not needed.
    """
    options = {"need_dx": need_dx, "need_dw": need_dw and weight is not None}
    if torch.float64 in (s.dtype, None if weight is None else weight.dtype):
        return reference.rms_norm_backward_float64(
            dy, ds, s, weight, eps, offset, casting, **options
        )
    kernels = dispatch.norm_kernels(s, weight, dy, ds, backward=True) if triton else None
    if kernels is not None:
        return kernels.rms_norm_backward(dy, ds, s, rstd, weight, offset, casting, **options)

    def block(s: Tensor, rstd: Tensor, dy: Tensor, ds: Tensor | None) -> Results:
        return reference.rms_norm_backward(dy, ds, s, rstd, weight, offset, casting, **options)

    dx, dw = by_blocks(block, s, rstd, dy, ds, summed=1)
    return dx, dw


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, call: _Call
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, s, rstd)`` by the kernels if they can, else by torch."""
    eps, offset, casting, out, _, triton = call
    kernels = dispatch.norm_kernels(x, weight, residual, out) if triton else None
    if kernels is not None:
        y, s, rstd = kernels.rms_norm(x, residual, weight, eps, offset, casting, out=out)
        if out is not None and not out.is_inference():
            # autograd knows of no kernel's writes: whoever saved the old content must hear of it.
            torch.autograd.graph.increment_version(out)
    else:
        s = x if residual is None else residual + x

        def block(s: Tensor) -> Results:
            return reference.rms_norm(s, weight, eps, offset, casting)

        y, rstd = cast(tuple[Tensor, Tensor], by_blocks(block, s))
        if out is not None:
            out.copy_(y)
    # An alias, for autograd to hang the gradient on; the caller's own tensor stays a plain buffer.
    return (y if out is None else out.detach()), s, rstd


class _ReduceGradient(torch.autograd.Function):
    """A float32 copy of the weight; its gradient is reduced, then rounded. Saves nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, reduce: Reduce) -> Tensor:
        """Copy the weight."""
        ctx.reduce, ctx.dtype = reduce, weight.dtype
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, None]:
        """Reduce and round."""
        return ctx.reduce(dw).to(ctx.dtype), None


def _traced(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, call: _Call
) -> Tensor | tuple[Tensor, Tensor]:
    """The same in torch operations, left to the compiler's own autograd."""
    s = x if residual is None else residual + x
    dtype = rms_norm_dtype(s.dtype, None if weight is None else weight.dtype, call.casting)
    if weight is not None and call.reduce is not None and weight.requires_grad:
        weight = _ReduceGradient.apply(weight, call.reduce)
    y, _ = reference.rms_norm(s, weight, call.eps, call.offset, call.casting, dtype)
    if call.out is not None:
        call.out.copy_(y.detach())
    return y if residual is None else (y, s)
