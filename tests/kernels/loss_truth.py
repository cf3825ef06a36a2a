"""float64 truth of the cross entropy, and error bounds derived for it.

`u` is float32's unit roundoff. A logit's value passes few roundings (scale, cap, differences from
the peak), each wrong by u times its size, which is below Z + |cap| for the row's largest |z| = Z;
`exp` turns that into a relative error of a probability. A tree sum of n terms adds log2(n) u. So
r = (log2(n) + 16 + 12 (Z + |cap|)) u bounds the error of the loss, and the relative one of p.
The gradient is `slope * dloss * (p - target)`, rounded once more to the logits' dtype. The slope
1 - tanh(y)^2 = 4 e / (1 + e)^2 comes from e = exp(-2 |y|), whose relative error is 2 |y| u.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from tests.kernels.exact import U, assert_within, tiny

IGNORE = -100


def mapped(x, scale=1.0, softcap=None, **_):
    """The logits that count."""
    return x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)


def truth(x, labels, dloss, *, ignore_index=IGNORE, **form):
    """`(loss, gradient)` in float64, by torch's own cross entropy and autograd."""
    x = x.detach().double().requires_grad_()
    flat, flat_labels = mapped(x, **form).reshape(-1, x.shape[-1]), labels.reshape(-1)
    loss = functional.cross_entropy(
        flat,
        flat_labels,
        ignore_index=ignore_index,
        reduction="none",
    ).view(labels.shape)
    (grad,) = torch.autograd.grad(loss, x, dloss.double())
    return loss.detach(), grad


def check(x, labels, loss, grad, dloss, **form):
    """Loss `[...]` and gradient against the truth; NaN and Inf where the truth has them."""
    want_loss, want = truth(x, labels, dloss, **form)
    wide = torch.promote_types(x.dtype, torch.float32)
    u = torch.finfo(wide).eps / 2
    assert loss.dtype == wide
    assert grad.dtype == x.dtype
    n, cap, scale = x.shape[-1], abs(form.get("softcap") or 0.0), abs(form.get("scale", 1.0))
    z = mapped(x.double(), **form)
    size = z.abs().nan_to_num(0, 0, 0).amax(-1) if n else torch.zeros(labels.shape)
    r = (math.log2(max(n, 2)) + 16 + 12 * (size + cap)) * u
    assert_within(loss.detach(), want_loss, r, "loss")

    p = z.softmax(-1).nan_to_num(0)
    steep = 0.0 if not cap else 4 * (x.double() * scale / cap).abs().nan_to_num(0, 0, 0)
    factor = scale * dloss.double().abs()[..., None]
    bound = factor * (r[..., None] * p + 8 * u * (p + 1)) + want.abs() * (8 + steep) * u
    bound = bound + U.get(x.dtype, u) * (want.abs() + bound) + tiny_of(x.dtype)
    assert_within(grad, want, bound.nan_to_num(0, 0, 0), "gradient")


def tiny_of(dtype):
    return 0.0 if dtype == torch.float64 else tiny(dtype)


def case(tokens, columns, dtype=torch.bfloat16, *, spread=4.0, seed=0, ignored=True):
    """Logits, labels (some to ignore) and the gradient of the losses."""
    g = torch.Generator().manual_seed(seed)
    x = (spread * torch.randn(*tokens, columns, generator=g, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, columns, tokens, generator=g)
    if ignored and labels.numel() > 1:
        labels.view(-1)[1::3] = IGNORE
    dloss = torch.randn(tokens, generator=g)
    return x, labels, dloss.to(torch.promote_types(dtype, torch.float32))
