"""Refusals of the norm's arguments, before anything is computed.

Owns the checks and their messages. Must not know how the norm is computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_sp.errors import ConfigError, ShapeError
from hf_sp.kernels.reference import CASTINGS, Casting, rms_norm_dtype
from hf_sp.torch_private import same_storage

_WHERE = "hf_sp.kernels.rms_norm"


def check_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    offset: float,
    casting: str,
) -> None:
    """Refuse what :func:`hf_sp.kernels.norm.rms_norm` cannot work with; arguments as there."""
    if casting not in CASTINGS:
        raise ConfigError(
            "rms_norm does not know this casting.",
            where=f"{_WHERE}(casting=)",
            got=repr(casting),
            legal=", ".join(CASTINGS),
        )
    if casting == "llama" and offset:
        raise ConfigError(
            "The llama form of RMSNorm has no offset.",
            where=f"{_WHERE}(offset=)",
            got=f"offset={offset} with casting='llama'",
            rule="no model rounds before it multiplies with offset + weight",
            legal="offset=0.0, or casting='gemma'",
        )
    if not eps >= 0:
        raise ConfigError(
            "rms_norm needs an eps that keeps the root real.",
            where=f"{_WHERE}(eps=)",
            got=repr(eps),
            legal="a number >= 0",
        )
    if not x.is_floating_point() or x.dim() == 0:
        raise ShapeError(
            "rms_norm works on rows of floating point numbers.",
            where=f"{_WHERE}(x)",
            got=f"{list(x.shape)} {x.dtype}",
            legal="[..., N] in float32, bfloat16, float16 or float64",
        )
    if weight is not None and (
        weight.shape != x.shape[-1:] or weight.device != x.device or not weight.is_floating_point()
    ):
        raise ShapeError(
            "This weight does not fit the rows that are to be normalised.",
            where=f"{_WHERE}(weight)",
            got=f"weight {_about(weight)}, x {_about(x)}",
            rule="one weight per element of the last dimension, on x's device",
            legal=f"[{x.shape[-1]}] on {x.device}, or None",
        )
    if residual is not None and (
        residual.shape != x.shape or residual.device != x.device or not residual.is_floating_point()
    ):
        raise ShapeError(
            "This residual cannot be added to x.",
            where=f"{_WHERE}(residual=)",
            got=f"residual {_about(residual)}, x {_about(x)}",
            rule="the sum is elementwise, and never broadcasts",
            legal=f"{list(x.shape)} on {x.device}",
        )


def check_out(
    out: Tensor, x: Tensor, weight: Tensor | None, residual: Tensor | None, casting: Casting
) -> None:
    """Refuse an ``out`` that is no place for y; arguments as in ``rms_norm``."""
    s_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    dtype = rms_norm_dtype(s_dtype, None if weight is None else weight.dtype, casting)
    if out.shape != x.shape or out.dtype != dtype or out.device != x.device:
        raise ShapeError(
            "out is no place for this norm's result.",
            where=f"{_WHERE}(out=)",
            got=_about(out),
            rule="it must have y's shape, dtype and device",
            legal=f"{list(x.shape)} {dtype} on {x.device}",
        )
    if out.requires_grad:
        raise ConfigError(
            "out must be plain memory, not a tensor that autograd follows.",
            where=f"{_WHERE}(out=)",
            got="a tensor that requires a gradient",
            rule="its content is overwritten; the gradient goes through the tensor returned",
            remedy="pass out.detach()",
        )
    if torch.compiler.is_compiling():
        return  # no addresses to compare, and y gets memory of its own
    for name, other in (("x", x), ("weight", weight), ("residual", residual)):
        if other is not None and _overlap(out, other):
            raise ConfigError(
                f"out overlaps {name} in memory.",
                where=f"{_WHERE}(out=)",
                got=f"out and {name} in one storage, their ranges of addresses meet",
                rule="the inputs are read while y is written, and again in backward",
                remedy="give out memory of its own",
            )


def _about(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"


def _span(x: Tensor) -> tuple[Any, Any]:
    """First byte and the one past the last, within the storage."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    start = x.storage_offset() * x.element_size()
    return start, start + (last + 1) * x.element_size()


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors may share memory: interleaved ones count as if they did."""
    if x.numel() == 0 or y.numel() == 0 or not same_storage(x, y):
        return False
    (x_start, x_end), (y_start, y_end) = _span(x), _span(y)
    return x_start < y_end and y_start < x_end
