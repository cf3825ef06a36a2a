"""The kernels as custom operators, ``torch.ops.hf_sp.*``, for graphs that must keep them whole.

Owns schemas, fakes and gradients. Importing this module registers them; nothing else needs it:
:func:`hf_sp.kernels.rms_norm` and :func:`hf_sp.kernels.swiglu` are plain torch operations when they
are compiled, which a compiler can fuse. Must not know modules or ranks: a caller sums ``dweight``.

Each takes the Triton path where :mod:`hf_sp.kernels.launch` allows it, and torch elsewhere. They
change no input; results are contiguous and share memory with nothing.

========================= ==================================================================
operator                  schema
========================= ==================================================================
``rms_norm``              ``(x, weight?, eps, offset, casting) -> (y, rstd)``
``add_rms_norm``          ``(x, residual, weight?, eps, offset, casting) -> (y, s, rstd)``
``rms_norm_backward``     ``(dy, ds?, s, rstd, weight?, eps, offset, casting) -> (dx, dweight)``
``swiglu``                ``(gate, up) -> z``
``swiglu_backward``       ``(dz, gate, up) -> (dgate, dup)``
========================= ==================================================================

``dweight`` is float32, without elements where there is no weight; rstd passes no gradient on.
Arguments mean what they do in :func:`hf_sp.kernels.norm.rms_norm`. Of float64 the forward has the
same bits as there, the gradients are those of the float32 formulas: below an operator autograd,
which gives the others, is off.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from hf_sp.kernels import norm, reference
from hf_sp.kernels.reference import Casting, rms_norm_dtype
from hf_sp.kernels.swiglu import swiglu_backward as _swiglu_backward
from hf_sp.kernels.swiglu import swiglu_forward as _swiglu_forward

_op = torch.library.custom_op
_contiguous = torch.contiguous_format


def _y_like(s: Tensor, weight: Tensor | None, casting: str) -> Tensor:
    dtype = rms_norm_dtype(
        s.dtype, None if weight is None else weight.dtype, cast(Casting, casting)
    )
    return torch.empty_like(s, dtype=dtype, memory_format=_contiguous)


def _rstd_like(s: Tensor) -> Tensor:
    return s.new_empty(s.shape[:-1], dtype=torch.float32)


@_op("hf_sp::rms_norm", mutates_args=())
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor]:
    """``(y, rstd)``; see the module."""
    y, rstd = norm.rms_norm_forward(
        x.contiguous(), weight, eps, offset=offset, casting=cast(Casting, casting)
    )
    return y, rstd


@rms_norm.register_fake
def _(x, weight, eps, offset, casting):
    return _y_like(x, weight, casting), _rstd_like(x)


@_op("hf_sp::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, casting: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, s, rstd)``; see the module."""
    y, s, rstd = norm.add_rms_norm_forward(
        x.contiguous(),
        residual.contiguous(),
        weight,
        eps,
        offset=offset,
        casting=cast(Casting, casting),
    )
    return y, s, rstd


@add_rms_norm.register_fake
def _(x, residual, weight, eps, offset, casting):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    s = torch.empty_like(x, dtype=dtype, memory_format=_contiguous)
    return _y_like(s, weight, casting), s, _rstd_like(s)


@_op("hf_sp::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting: str,
) -> tuple[Tensor, Tensor]:
    """``(dx, dweight)``; see the module."""
    s, form = s.contiguous(), cast(Casting, casting)
    dtypes = (s.dtype, s.dtype if weight is None else weight.dtype)
    if torch.float64 in dtypes:
        dx, dw = reference.rms_norm_backward(dy, ds, s, rstd, weight, offset, form)
    else:
        dx, dw = norm.rms_norm_backward(dy, ds, s, rstd, weight, eps, offset=offset, casting=form)
    assert dx is not None
    if dw is None:
        dw = s.new_empty(0, dtype=torch.float32)
    return dx.contiguous(), dw


@rms_norm_backward.register_fake
def _(dy, ds, s, rstd, weight, eps, offset, casting):
    size = 0 if weight is None else weight.shape[0]
    dx = torch.empty_like(s, memory_format=_contiguous)
    return dx, s.new_empty(size, dtype=torch.float32)


def _norm_grads(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Any, Any]:
    s, rstd, weight = ctx.saved_tensors
    if dy is None:
        return ds, None
    dx, dw = rms_norm_backward(dy, ds, s, rstd, weight, *ctx.form)
    return dx, None if weight is None else dw.to(weight.dtype)


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, weight, *ctx.form = inputs
    ctx.save_for_backward(x, output[1], weight)
    ctx.set_materialize_grads(False)


def _norm_backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    dx, dw = _norm_grads(ctx, dy, None)
    return dx, dw, None, None, None


rms_norm.register_autograd(_norm_backward, setup_context=_norm_setup)


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, residual, weight, *ctx.form = inputs
    _, s, rstd = output
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(s, rstd, weight)
    ctx.set_materialize_grads(False)


def _add_norm_backward(
    ctx: Any, dy: Tensor | None, ds: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    dx, dw = _norm_grads(ctx, dy, ds)
    dx, dresidual = (None, None) if dx is None else (dx.to(dtype) for dtype in ctx.dtypes)
    return dx, dresidual, dw, None, None, None


add_rms_norm.register_autograd(_add_norm_backward, setup_context=_add_norm_setup)


@_op("hf_sp::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``z``; see the module."""
    return _swiglu_forward(gate.contiguous(), up)


@swiglu.register_fake
def _(gate, up):
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return torch.empty_like(gate, dtype=dtype, memory_format=_contiguous)


@_op("hf_sp::swiglu_backward", mutates_args=())
def swiglu_backward(dz: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """``(dgate, dup)``; see the module."""
    dgate, dup, _ = _swiglu_backward(dz.contiguous(), gate.contiguous(), up.contiguous())
    return dgate, dup


@swiglu_backward.register_fake
def _(dz, gate, up):
    return (
        torch.empty_like(gate, memory_format=_contiguous),
        torch.empty_like(up, memory_format=_contiguous),
    )


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_grads(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
    return swiglu_backward(dz, *ctx.saved_tensors)


swiglu.register_autograd(_swiglu_grads, setup_context=_swiglu_setup)
