"""Attention that also gives the log of its softmax's sum: private operators of torch.

``F.scaled_dot_product_attention`` keeps that number to itself, which joins attentions over parts of
the keys. Its kernels are operators with private names; which one takes what stands here. Held with
torch 2.11 to 2.14 in mind by tests/unit/test_torch_attention.py. On CUDA it is not measured.

Must not know hf_sp.

Shape letters: B batch, a query heads, c key/value heads (c divides a), n queries, m keys, D and E
features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten: Any = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_LSE_ROWS = 32
"""The efficient kernel's sums are padded to a multiple of that, with infinity."""
_BIAS_COLUMNS = 16
"""And rows of its mask start at a multiple of that."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of some queries over some keys.

    Shapes: q [B, a, n, D], k [B, c, m, D], v [B, c, m, E], none of them empty; mask, added to the
            scores, [B or 1, a or 1, n, m] of q's dtype -> out [B, a, n, E] of q's dtype, and the
            log-sum-exp of the scores [B, a, n], float32, of float64 float64. A query to which the
            mask leaves nothing: zeros, and -inf
    Causal: query i sees the keys up to i
    """
    E, q, k, v = v.shape[-1], *_of_one_width(q, k, v)
    n, groups = q.shape[2], q.shape[1] // k.shape[1]
    if q.is_cpu:
        run = _aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = run(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    elif mask is None and q.dtype in _HALF:
        run = _aten._scaled_dot_product_flash_attention.default
        out, lse = run(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        run = _aten._scaled_dot_product_efficient_attention.default
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        out, lse = run(q, k, v, _bias(mask, q, k), True, 0.0, causal, scale=scale)[:2]
    out, lse = out[..., :E], lse[..., :n]
    if mask is None:
        return out, lse
    # Kernels have different numbers here.
    nothing = mask.eq(float("-inf")).all(-1)
    return out.masked_fill(nothing[..., None], 0), lse.masked_fill(nothing, float("-inf"))


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by these keys of an attention over more, whose output and log-sum-exp are given.

    Shapes: as of ``attention``; dout as out; lse finite -> dq, dk, dv as q, k, v
    """
    D, E, groups = q.shape[-1], v.shape[-1], q.shape[1] // k.shape[1]
    q, k, v, out, dout = _of_one_width(q, k, v, out, dout)
    given, n, m = (dout, q, k, v, out, lse), q.shape[2], k.shape[2]
    if q.is_cpu:
        run = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        dq, dk, dv = run(*given, 0.0, causal, attn_mask=mask, scale=scale)
    elif mask is None and q.dtype in _HALF:
        run = _aten._scaled_dot_product_flash_attention_backward.default
        # Seed and offset of dropout, which there is none of.
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        dq, dk, dv = run(*given, None, None, n, m, 0.0, causal, seed, seed[0], scale=scale)
    else:
        run = _aten._scaled_dot_product_efficient_attention_backward.default
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        lse = F.pad(lse, (0, -n % _LSE_ROWS), value=float("inf"))
        bias, seed = _bias(mask, q, k), torch.zeros((), dtype=torch.int64, device=q.device)
        wanted = [True, True, True, False]
        more = bias, out, lse, seed, seed, 0.0, wanted, causal
        dq, dk, dv, _ = run(dout, q, k, v, *more, scale=scale)
        dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq[..., :D], dk[..., :D], dv[..., :E]


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    """Features padded with zeros to one number of them, which the kernels ask for."""
    width = max(x.shape[-1] for x in tensors)
    width += 0 if tensors[0].is_cpu else -width % 8
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors]


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as the efficient kernel takes it, ``[B, a, n, m]``."""
    if mask is None:
        return None
    m = mask.shape[-1]
    mask = F.pad(mask, (0, -m % _BIAS_COLUMNS))[..., :m]
    return mask.expand(*q.shape[:3], k.shape[2])
