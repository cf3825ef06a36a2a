"""What is right: float64 over the same bf16 inputs, and how far from it a bf16 result may be.

Owns the reference and the bounds. Must not know who computed what it is shown.

U = 2**-8 is half an ulp of bf16 at the lower end of a binade: what one rounding may move a number
by, relative to it. A bound is so many U of a scale: the size of the number where it is a product,
the sum of its terms' sizes where it is a difference. float32 work in between adds some 1e-6. Bounds
hold for whoever computes as Hugging Face's modules do, or rounds less often; each has half a U on
top for second-order terms, and so does catch a dropped term, row or factor.

============ ======================================================================= =====
y            1. x * rstd, 2. that times w                                              2.5
dx           1. dy * w, 2. the result                                                  2.5
             of ``rstd * (|g| + |x| mean |g x|)``, the terms of the difference
dw           three roundings of the terms of a sum: independent, so their squares add  6.0
             up. sqrt(3) * U / sqrt(3) is one standard deviation at most, five of them
             and the rounding of the result, of ``sqrt(sum (dy x)^2) + |dw|``
silu * up    1. silu, 2. the product                                                   2.5
dup, dgate   1. dz * silu or dz * up, 2. the result                                    2.5
dlogits      1. the result, 2. a factor from above, of ``p + onehot``                  2.5
loss         float32: 200 additions of one sign, 200 * 2**-24 = 1.2e-5 of it. Returned
             in bf16 it is rounded, per token and as a sum                           2.5 U
============ ======================================================================= =====
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from scripts.bench._kernels.cases import EPS, IGNORED, Data

U = 2.0**-8
LOSS_BOUND = 200 * 2.0**-24
# Where everything is 0, so must the result be, and 0 / 0 must not be NaN.
_TINY = 1e-30
# Elements of float64 at a time.
_SLAB = 2**24


class Worst:
    """The result that is farthest from the reference, in units of its bound."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        self._seen: dict[str, tuple[Tensor, float]] = {}

    def take(self, name: str, got: Tensor, want: Tensor, scale: Tensor, bound: float) -> None:
        """Compare a part of a result.

        Args:
            name: of the result.
            got: what was computed.
            want: the reference.
            scale: what the bound is relative to, elementwise.
            bound: the largest right distance.

        Raises:
            ValueError: another shape.
        """
        if got.shape != want.shape:
            raise ValueError(f"{name} is {list(got.shape)}, not {list(want.shape)}")
        error = ((got.double() - want).abs() / (scale + _TINY)).amax()
        if name in self._seen:
            # maximum keeps NaN, max() might not.
            error = torch.maximum(self._seen[name][0], error)
        self._seen[name] = error, bound

    def result(self) -> tuple[str, float, float]:
        """``(name, error, bound)`` of the worst; NaN is worse than anything."""
        found = [(name, float(error), bound) for name, (error, bound) in self._seen.items()]
        return max(found, key=lambda one: one[1] / one[2] if one[1] == one[1] else float("inf"))


def check(data: Data, step: str, results: tuple[Tensor, ...]) -> tuple[str, float, float]:
    """Compare results with float64.

    Args:
        data: the inputs, as they were before.
        step: which of the operation's steps.
        results: forward: y, or the product. backward: gradients of the inputs in their
            order. recompute: those and the product. ce: loss and gradient; statistics: the loss.

    Returns:
        ``(name, error, bound)`` of the result that is worst in units of its bound. It is right if
        error <= bound, which NaN is not.
    """
    worst = Worst()
    if data.case.op == "ce":
        _cross_entropy(data, step, results, worst)
    elif data.case.op == "swiglu":
        _swiglu(data, step, results, worst)
    else:
        _norm(data, step, results, worst)
    return worst.result()


def _slabs(data: Data) -> Iterator[slice]:
    step = max(1, _SLAB // data.case.n)
    return (slice(i, i + step) for i in range(0, data.case.rows, step))


def _norm(data: Data, step: str, results: tuple[Tensor, ...], worst: Worst) -> None:
    x, w = (one.detach() for one in data.inputs)
    w64 = w.double()
    sums = [torch.zeros_like(w64) for _ in range(2)]
    for rows in _slabs(data):
        x64 = x[rows].double()
        rstd = (x64.square().mean(-1, keepdim=True) + EPS).rsqrt()
        xhat = x64 * rstd
        if step == "forward":
            y = xhat * w64
            worst.take("y", results[0][rows], y, y.abs(), 2.5 * U)
            continue
        dy = data.grads[0][rows].double()
        g = dy * w64
        dx = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
        scale = rstd * (g.abs() + xhat.abs() * (g * xhat).abs().mean(-1, keepdim=True))
        worst.take("dx", results[0][rows], dx, scale, 2.5 * U)
        sums[0] += (dy * xhat).sum(0)
        sums[1] += (dy * xhat).square().sum(0)
    if step != "forward":
        worst.take("dw", results[-1], sums[0], sums[1].sqrt() + sums[0].abs(), 6 * U)


def _swiglu(data: Data, step: str, results: tuple[Tensor, ...], worst: Worst) -> None:
    gate, up = (one.detach() for one in data.inputs)
    for rows in _slabs(data):
        g, u, dz = gate[rows].double(), up[rows].double(), data.grads[0][rows].double()
        sigmoid = g.sigmoid()
        silu = g * sigmoid
        if step != "backward":
            z = silu * u
            worst.take("z", results[-1][rows], z, z.abs(), 2.5 * U)
        if step == "forward":
            continue
        slope = sigmoid + silu * (1 - sigmoid)
        scale = (dz * u).abs() * (sigmoid + silu.abs() * (1 - sigmoid))
        worst.take("dgate", results[0][rows], dz * u * slope, scale, 2.5 * U)
        worst.take("dup", results[1][rows], dz * silu, (dz * silu).abs(), 2.5 * U)


def _cross_entropy(data: Data, step: str, results: tuple[Tensor, ...], worst: Worst) -> None:
    (logits,), labels = data.inputs, data.labels
    assert labels is not None
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for rows in _slabs(data):
        counted = (labels[rows] != IGNORED).unsqueeze(1)
        z = logits.detach()[rows].double()
        one = torch.zeros_like(z).scatter_(1, labels[rows].clamp(min=0).unsqueeze(1), 1.0)
        log_p = z.log_softmax(1)
        total -= (log_p * one * counted).sum()
        if step == "statistics":
            continue
        p = log_p.exp_()
        want, scale = (p - one) * counted, (p + one) * counted
        worst.take("dlogits", results[-1][rows], want, scale, 2.5 * U)
    if step != "gradient":
        bound = LOSS_BOUND if results[0].dtype == torch.float32 else 2.5 * U
        worst.take("loss", results[0].reshape(()), total, total, bound)
