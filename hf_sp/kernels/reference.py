"""RMSNorm and SwiGLU in torch operations: forward as Hugging Face writes them, backward by hand.

Owns the arithmetic, which the Triton kernels repeat, and the one place where the casting modes are
spelled out. Runs on any tensor (CPU, DTensor, fake, meta, zero rows, any width) and traces. Must
not know when it is used, autograd.Functions, or Triton. Arguments are those of
:mod:`hf_sp.kernels.norm` and :mod:`hf_sp.kernels.swiglu`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Casting = Literal["llama", "gemma", "gpt_oss"]
CASTINGS: tuple[Casting, ...] = ("llama", "gemma", "gpt_oss")
Gating = tuple[Literal["silu", "gelu_tanh", "clamped"], float, float]
"""What makes one of gate and up: ``act(gate) * up``, or gpt-oss's, of its alpha and its limit."""
SILU: Gating = ("silu", 1.0, 0.0)
GELU_TANH: Gating = ("gelu_tanh", 1.0, 0.0)


# GELU's tanh form: tanh(sqrt(2 / pi) * (g + 0.044715 g^3)).
_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
_GELU_CUBE = 0.044715


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: Casting
) -> tuple[Tensor, Tensor]:
    """``(y, rstd)``, operation by operation as in Hugging Face's source: the bits are the same."""
    x32 = x.to(torch.float32)
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    y = x32 * rstd
    if casting != "llama":
        if weight is not None:
            # Gemma casts the weight itself, gpt-oss leaves it to promotion: float64 shows it.
            cast = casting == "gemma" or offset
            y = (offset + weight.to(torch.float32) if cast else weight) * y
        return y.to(x.dtype), rstd.squeeze(-1)
    y = y.to(x.dtype)
    return y if weight is None else weight * y, rstd.squeeze(-1)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    offset: float,
    casting: Casting,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`rms_norm`, in float32 up to one rounding of dx at the end.

    With ``xhat = x * rstd`` and ``g = dy * (offset + w)``: ``dx = rstd * (g - xhat * mean(g *
    xhat))`` and ``dw = sum over rows of dy * xhat``, where xhat is the rounded one in the llama
    form, which is what the weight was multiplied with.
    """
    fp32 = torch.float32
    rstd = rstd.unsqueeze(-1)
    dy32 = dy.to(fp32)
    xhat = x.to(fp32) * rstd
    dw = None
    if need_dw:
        dw = dy32 * (xhat.to(x.dtype).to(fp32) if casting == "llama" else xhat)
        dw = dw.sum(tuple(range(x.dim() - 1))) if x.dim() > 1 else dw
    if not need_dx:
        return None, dw
    g = dy32
    if weight is not None:
        gain = weight.to(fp32)
        g = dy32 * (offset + gain if offset else gain)
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx.to(x.dtype), dw


def rms_norm_backward_float64(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting: Casting,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`rms_norm` where float64 is involved: autograd's own, bit for bit.

    Hugging Face's norm computes in float32 even then, so its gradients carry float32 noise, and
    float64 runs are compared with it far below that. Same operations, same order, same noise.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(need_dx)
        weight = None if weight is None else weight.detach().requires_grad_(need_dw)
        y, _ = rms_norm(x, weight, eps, offset, casting)
        leaves = [leaf for leaf in (x, weight) if leaf is not None and leaf.requires_grad]
        grads = iter(torch.autograd.grad(y, leaves, dy) if leaves else ())
    return next(grads) if need_dx else None, next(grads) if need_dw else None


def swiglu(gate: Tensor, up: Tensor, gating: Gating = SILU) -> Tensor:
    """``act(gate) * up`` as Hugging Face computes it: act is rounded before the product.

    ``clamped``: ``(up + 1) * gate * sigmoid(alpha * gate)`` of a gate of at most ``limit`` and an
    up between ``-limit`` and ``limit``.
    """
    name, alpha, limit = gating
    if name == "clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return (F.silu(gate) if name == "silu" else F.gelu(gate, approximate="tanh")) * up


def swiglu_backward(
    dz: Tensor, gate: Tensor, up: Tensor, product: bool, gating: Gating = SILU
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`swiglu`, each rounded once; float32 inside, float64 for float64.

    Each activation is ``g * sigmoid(v(g))``: v is g, alpha g, or for GELU a cubic.
    """
    name, alpha, limit = gating
    wide = torch.promote_types(torch.promote_types(gate.dtype, up.dtype), torch.float32)
    g, u, dz = gate.to(wide), up.to(wide), dz.to(wide)
    dgate = dz
    if name == "clamped":
        # Nothing flows through what is cut off, and at the edge all does, as torch has it.
        dgate, dz = dz * (g <= limit), dz * ((u >= -limit) & (u <= limit))
        g, u = g.clamp(max=limit), u.clamp(-limit, limit) + 1
    inner = g
    if name == "gelu_tanh":
        # (1 + tanh(w)) / 2 = sigmoid(2 w)
        inner = _GELU_SLOPE * (g + _GELU_CUBE * g.pow(3))
    elif name == "clamped":
        inner = alpha * g
    sigmoid = torch.sigmoid(inner)
    act = g * sigmoid
    # d act / dg = sigmoid * (1 + g * (1 - sigmoid) * v'(g)), with the bracket multiplied out.
    slope = act * (1 - sigmoid)
    if name == "gelu_tanh":
        slope = slope * (_GELU_SLOPE * (1 + 3 * _GELU_CUBE * g.square()))
    elif name == "clamped":
        slope = alpha * slope
    dgate = dgate * u * (sigmoid + slope)
    dup = dz * act
    z = swiglu(gate, up, gating) if product else None
    return dgate.to(gate.dtype), dup.to(up.dtype), z
