"""float64 truth for RMSNorm and SwiGLU, error bounds derived for each, and the comparison.

Bounds are per element. `u` is the unit roundoff of a dtype (half the spacing at 1, 2^-8 for
bfloat16): one rounding of a value v is wrong by at most u * |v|, or half the smallest subnormal.
Noise of float32 arithmetic: a tree sum of n terms is wrong by log2(n) roundings of the sum of
magnitudes at most, and no formula here has more than 16 further roundings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sp.kernels.norm import rms_norm, rms_norm_backward, rms_norm_forward

U = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def tiny(dtype):
    """Half the smallest subnormal: what a rounding can lose of a number near zero."""
    return torch.finfo(dtype).smallest_normal * U[dtype]


def fp32_noise(n):
    return (math.log2(max(n, 2)) + 16) * U[torch.float32]


@dataclass
class Case:
    """Inputs of one norm, and how it is called."""

    x: Tensor
    weight: Tensor | None
    eps: float = 1e-6
    offset: float = 0.0
    casting: str = "llama"

    @property
    def form(self):
        return {"offset": self.offset, "casting": self.casting}


def random_case(shape, dtype=torch.bfloat16, casting="llama", *, weight="same", seed=0):
    """Normal inputs. A weight away from zero, as a norm's is, and not all alike."""
    g = torch.Generator().manual_seed(seed)
    n = shape[-1]
    w = None
    if weight is not None:
        w = (1 + 0.5 * torch.randn(n, generator=g)).to(dtype if weight == "same" else weight)
    return Case(
        torch.randn(shape, generator=g).to(dtype),
        w,
        offset=1.0 if casting == "gemma" else 0.0,
        casting=casting,
    )


def like(x, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=g).to(device=x.device, dtype=x.dtype)


def assert_within(found, truth, bound, what):
    """Elementwise; NaN and Inf must be where the truth has them."""
    found = found.double()
    wrong = ~((found - truth).abs() <= bound) & ~(
        (found == truth) | (found.isnan() & truth.isnan())
    )
    if wrong.any():
        at = wrong.nonzero()[0].tolist()
        index = tuple(at)
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} outside, first at {at}: "
            f"{found[index]} for {truth[index]} +- {bound[index]}"
        )


def _gain(case):
    # Without a weight there is no offset either.
    if case.weight is None:
        return torch.ones((), dtype=torch.float64, device=case.x.device)
    return case.offset + case.weight.double()


def check_forward(case, y, rstd=None):
    """y (and rstd) against float64."""
    x = case.x.double()
    n = x.shape[-1]
    true_rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + case.eps)
    gain = _gain(case)
    truth = x * true_rstd * gain
    # fp32 noise, the last rounding, and in the llama form the one before the weight.
    in_dtype = case.x.dtype
    bound = truth.abs() * (U[y.dtype] + fp32_noise(n)) + tiny(y.dtype)
    if case.casting == "llama":
        bound = bound * (1 + U[in_dtype]) + truth.abs() * U[in_dtype]
        bound = bound + tiny(in_dtype) * gain.abs()
    assert_within(y, truth, bound, "y")
    if rstd is not None:
        true_rstd = true_rstd.squeeze(-1)
        assert_within(rstd, true_rstd, true_rstd * fp32_noise(n), "rstd")


def norm_gradients(case, dy):
    """`(dx, dw, bound of dx, bound of dw)` in float64; no bound has a rounding to bf16 in it but
    the last one of dx, and the llama form's of what the weight is multiplied with."""
    x = case.x.double()
    n = x.shape[-1]
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + case.eps)
    xhat, dy = x * rstd, dy.double()
    g = dy * _gain(case)
    dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    size = rstd * (g.abs() + xhat.abs() * (g * xhat).abs().mean(-1, keepdim=True))
    # Three sums of n or fewer terms (the statistics twice, and the product's mean).
    bound_dx = 3 * fp32_noise(n) * size
    bound_dx = bound_dx + U[case.x.dtype] * (dx.abs() + bound_dx) + tiny(case.x.dtype)
    products = (dy * xhat).reshape(-1, n)
    dw, size = products.sum(0), products.abs().sum(0)
    # Rows may be added one after the other.
    bound_dw = size * (fp32_noise(n) + x.numel() // n * U[torch.float32])
    if case.casting == "llama":
        bound_dw = (
            bound_dw + size * U[case.x.dtype] + dy.abs().reshape(-1, n).sum(0) * tiny(case.x.dtype)
        )
    return dx, dw, bound_dx, bound_dw


def check_norm(case, *, triton=True, dy=None):
    """Forward and backward of one case against float64, through autograd and below it.

    Returns what was computed, for bitwise comparisons: y, dx, dw (float32).
    """
    leaves = [x for x in (case.x, case.weight) if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y = rms_norm(case.x, case.weight, case.eps, triton=triton, **case.form)
    assert type(y.grad_fn).__name__ == "RmsNormBackward"
    dy = like(y, 1) if dy is None else dy
    kept = dy.clone()
    found = torch.autograd.grad(y, leaves, dy)
    for leaf in leaves:
        leaf.requires_grad_(False)
    assert torch.equal(dy, kept), "the incoming gradient was written to"
    y = y.detach()

    again, rstd = rms_norm_forward(case.x, case.weight, case.eps, triton=triton, **case.form)
    assert torch.equal(again, y), "recomputed differently"
    check_forward(case, y, rstd)

    dx, dw, bound_dx, bound_dw = norm_gradients(case, dy)
    assert_within(found[0], dx, bound_dx, "dx")
    assert found[0].dtype == case.x.dtype
    _, dw32 = rms_norm_backward(dy, case.x, rstd, case.weight, case.eps, triton=triton, **case.form)
    if case.weight is not None:
        assert dw32.dtype == torch.float32
        assert_within(dw32, dw, bound_dw, "dw")
        assert torch.equal(found[-1], dw32.to(case.weight.dtype))
    return y, found[0], dw32
