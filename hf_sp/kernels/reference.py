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

Casting = Literal["llama", "gemma", "gpt_oss"]
CASTINGS: tuple[Casting, ...] = ("llama", "gemma", "gpt_oss")


def rms_norm_dtype(x: torch.dtype, weight: torch.dtype | None, casting: Casting) -> torch.dtype:
    """The dtype that Hugging Face's norm returns: only the llama form promotes with the weight."""
    return torch.promote_types(x, weight) if casting == "llama" and weight is not None else x


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, casting: Casting
) -> tuple[Tensor, Tensor]:
    """RMSNorm as in Hugging Face's source, operation by operation, so that the bits are the same.

    Args:
        x: ``[..., N]``. Statistics are float32, for float64 input too, as there.
        weight: ``[N]`` or None.
        eps: added to the mean square.
        offset: added to the weight, in float32.
        casting: where it rounds; see :func:`hf_sp.kernels.norm.rms_norm`.

    Returns:
        ``(y [..., N], rstd [...] in float32)``.
    """
    x32 = x if x.dtype == torch.float32 else x.to(torch.float32)
    rstd = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    y = x32 * rstd
    if casting != "llama":
        if weight is not None:
            # Gemma casts the weight itself, gpt-oss leaves it to promotion: float64 shows it.
            cast = casting == "gemma" or offset
            y = (offset + weight.to(torch.float32) if cast else weight) * y
        return y.to(x.dtype), rstd.squeeze(-1)
    if y.dtype != x.dtype:
        y = y.to(x.dtype)
    return y if weight is None else weight * y, rstd.squeeze(-1)


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    offset: float,
    casting: Casting,
    need_dx: bool = True,
    need_dw: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`rms_norm`, in float32 up to one rounding at the end.

    With ``xhat = x * rstd`` and ``g = dy * (offset + w)``: ``dx = rstd * (g - xhat * mean(g *
    xhat))`` and ``dw = sum over rows of dy * xhat``, where xhat is the rounded one in the llama
    form, which is what the weight was multiplied with.

    Args:
        dy: gradient of y, ``[..., N]``.
        x: the norm's input.
        rstd: as the forward returned it, ``[...]`` in float32.
        weight: ``[N]`` or None.
        offset: as in the forward.
        casting: as in the forward.
        need_dx: whether the first result is wanted.
        need_dw: whether the second one is.

    Returns:
        ``(dx in x.dtype, dw [N] in float32, not rounded)``; None for what is not needed.
    """
    x_dtype, fp32 = x.dtype, torch.float32
    rstd = rstd.unsqueeze(-1)
    dy32 = dy if dy.dtype == fp32 else dy.to(fp32)
    xhat = (x if x_dtype == fp32 else x.to(fp32)) * rstd
    dw = None
    if need_dw and weight is not None:
        rounded = casting == "llama" and x_dtype != fp32
        dw = dy32 * (xhat.to(x_dtype).to(fp32) if rounded else xhat)
        dw = dw.sum(tuple(range(x.dim() - 1))) if x.dim() > 1 else dw
    if not need_dx:
        return None, dw
    if weight is None:
        g = dy32
    else:
        gain = weight if weight.dtype == fp32 else weight.to(fp32)
        g = dy32 * (offset + gain if offset else gain)
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    return dx if x_dtype == fp32 else dx.to(x_dtype), dw


def rms_norm_backward_float64(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting: Casting,
    need_dx: bool = True,
    need_dw: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of :func:`rms_norm` where float64 is involved: autograd's own, bit for bit.

    Hugging Face's norm computes in float32 even then, so its gradients carry float32 noise, and
    float64 runs are compared with it far below that. Same operations, same order, same noise.

    Args:
        dy: gradient of y.
        x: the norm's input.
        weight: ``[N]`` or None.
        eps: as in the forward, like the two below.
        offset: see eps.
        casting: see eps.
        need_dx: whether the first result is wanted.
        need_dw: whether the second one is.

    Returns:
        ``(dx in x.dtype, dw [N] in the weight's dtype)``; None for what is not needed.
    """
    need_dw = need_dw and weight is not None
    with torch.enable_grad():
        x_leaf = x.detach().requires_grad_(need_dx)
        w_leaf = None if weight is None else weight.detach().requires_grad_(need_dw)
        y, _ = rms_norm(x_leaf, w_leaf, eps, offset, casting)
        leaves = [leaf for leaf in (x_leaf, w_leaf) if leaf is not None and leaf.requires_grad]
        grads = list(torch.autograd.grad(y, leaves, dy)) if leaves else []
    dx = grads.pop(0) if need_dx else None
    return dx, grads.pop() if need_dw else None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` as Hugging Face computes it: silu is rounded before the product."""
    return F.silu(gate) * up


def swiglu_backward(
    dz: Tensor, gate: Tensor, up: Tensor, product: bool = False
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
    g = gate if gate.dtype == wide else gate.to(wide)
    dz = dz if dz.dtype == wide else dz.to(wide)
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    # d silu / dg = sigmoid * (1 + g * (1 - sigmoid)), with the bracket multiplied out.
    dgate = dz * (up if up.dtype == wide else up.to(wide)) * (sigmoid + silu * (1 - sigmoid))
    dup = dz * silu
    z = swiglu(gate, up) if product else None
    if gate.dtype != wide or up.dtype != wide:
        dgate, dup = dgate.to(gate.dtype), dup.to(up.dtype)
    return dgate, dup, z
