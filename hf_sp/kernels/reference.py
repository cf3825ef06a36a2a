"""RMSNorm and SwiGLU in torch operations: forward as Hugging Face writes them, backward by hand.

Owns the arithmetic, which the Triton kernels repeat, and the one place where the casting modes are
spelled out. Runs on any tensor (CPU, DTensor, fake, meta, zero rows, any width) and traces. Must
not know when it is used, autograd.Functions, or Triton.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Casting = Literal["llama", "gemma", "gpt_oss", "olmo2"]
CASTINGS: tuple[Casting, ...] = ("llama", "gemma", "gpt_oss", "olmo2")


def rms_norm_dtype(x: torch.dtype, weight: torch.dtype | None, casting: Casting) -> torch.dtype:
    """The dtype that Hugging Face's norm returns: only the llama form promotes with the weight."""
    return torch.promote_types(x, weight) if casting == "llama" and weight is not None else x


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting: Casting,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm as in Hugging Face's source, operation by operation, so that the bits are the same.

    Args:
        x: ``[..., N]``. Statistics are float32, for float64 input too, as there.
        weight: ``[N]`` or None.
        eps: added to the mean square.
        offset: added to the weight, in float32.
        casting: where it rounds; see :func:`hf_sp.kernels.norm.rms_norm`.
        dtype: of y, where the weight handed in is not the parameter but a float32 copy of it.

    Returns:
        ``(y [..., N], rstd [...] in float32)``.
    """
    x32 = x.to(torch.float32)
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    y = x32 * rstd
    if casting == "llama":
        y = y.to(x.dtype)
        if weight is not None:
            y = weight * y
    elif weight is not None:
        # Gemma casts the weight itself; the others leave it to promotion. It shows in float64 only.
        gain = offset + weight.to(torch.float32) if casting == "gemma" or offset else weight
        y = gain * y
    if dtype is None:
        dtype = rms_norm_dtype(x.dtype, None if weight is None else weight.dtype, casting)
    return y.to(dtype), rstd.squeeze(-1)


def rms_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    offset: float,
    casting: Casting,
    *,
    need_dx: bool = True,
    need_dw: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`rms_norm`, in float32 up to one rounding at the end.

    With ``x = s * rstd`` and ``g = dy * (offset + w)``: ``ds = rstd * (g - x * mean(g * x))`` and
    ``dw = sum over rows of dy * x``, where x is the rounded one in the llama form, which is what
    the weight was multiplied with.

    Args:
        dy: gradient of y, ``[..., N]``.
        ds: gradient that reached the norm's input by another way (the residual), or None.
        s: the norm's input.
        rstd: as the forward returned it, ``[...]`` in float32.
        weight: ``[N]`` or None.
        offset: as in the forward.
        casting: as in the forward.
        need_dx: whether the first result is wanted.
        need_dw: whether the second one is.

    Returns:
        ``(dx in s.dtype, dw [N] in float32, not rounded)``; None for what is not needed.
    """
    s32 = s.to(torch.float32)
    dy32 = dy.to(torch.float32)
    xhat = s32 * rstd.unsqueeze(-1)
    dw = None
    if need_dw and weight is not None:
        seen = xhat.to(s.dtype).to(torch.float32) if casting == "llama" else xhat
        dw = (dy32 * seen).sum(tuple(range(s.dim() - 1))) if s.dim() > 1 else dy32 * seen
    if not need_dx:
        return None, dw
    g = dy32 if weight is None else dy32 * (offset + weight.to(torch.float32))
    dx = rstd.unsqueeze(-1) * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    if ds is not None:
        dx = dx + ds.to(torch.float32)
    return dx.to(s.dtype), dw


def rms_norm_backward_float64(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting: Casting,
    *,
    need_dx: bool = True,
    need_dw: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`rms_norm` where float64 is involved: autograd's own, bit for bit.

    Hugging Face's norm computes in float32 even then, so its gradients carry float32 noise, and
    float64 runs are compared with it far below that. Same operations, same order, same noise.

    Args:
        dy: gradient of y.
        ds: gradient that reached the norm's input by another way, or None.
        s: the norm's input.
        weight: ``[N]`` or None.
        eps: as in the forward, like the two below.
        offset: see eps.
        casting: see eps.
        need_dx: whether the first result is wanted.
        need_dw: whether the second one is.

    Returns:
        ``(dx in s.dtype, dw [N] in the weight's dtype)``; None for what is not needed.
    """
    need_dw = need_dw and weight is not None
    with torch.enable_grad():
        s_leaf = s.detach().requires_grad_(need_dx)
        w_leaf = None if weight is None else weight.detach().requires_grad_(need_dw)
        y, _ = rms_norm(s_leaf, w_leaf, eps, offset, casting)
        leaves = [leaf for leaf in (s_leaf, w_leaf) if leaf is not None and leaf.requires_grad]
        grads = list(torch.autograd.grad(y, leaves, dy)) if leaves else []
    dx = grads.pop(0) if need_dx else None
    if dx is not None and ds is not None:
        dx = dx + ds
    return dx, grads.pop() if need_dw else None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` as Hugging Face computes it: silu is rounded before the product."""
    return F.silu(gate) * up


def swiglu_backward(
    dz: Tensor, gate: Tensor, up: Tensor, *, product: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`swiglu`, each rounded once; float32 inside, float64 for float64.

    Args:
        dz: gradient of the product, shaped like gate.
        gate: as in the forward.
        up: as in the forward.
        product: whether to compute the product again, bit-equal to the forward's.

    Returns:
        ``(dgate, dup, z or None)``.
    """
    wide = torch.promote_types(torch.promote_types(gate.dtype, up.dtype), torch.float32)
    g, dz_wide = gate.to(wide), dz.to(wide)
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    # d silu / dg = sigmoid * (1 + g * (1 - sigmoid)), with the bracket multiplied out.
    dgate = dz_wide * up.to(wide) * (sigmoid + silu * (1 - sigmoid))
    dup = dz_wide * silu
    z = swiglu(gate, up) if product else None
    return dgate.to(gate.dtype), dup.to(up.dtype), z
