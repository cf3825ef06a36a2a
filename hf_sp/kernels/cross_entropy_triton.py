"""Triton kernels of the vocab-parallel cross entropy, with their launchers and launch settings.

Must not know ranks or autograd. Imported at the first launch only; the same in torch stands in
``cross_entropy_steps.py``. Both kernels compute in float32 and in one order, without atomics: the
same input gives the same bits.

Shape letters: T tokens, v local vocabulary rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

import hf_sp.kernels.launch as dispatch
from hf_sp.kernels.cross_entropy_steps import Combined, LossTerms
from hf_sp.kernels.table import LaunchConfig, next_power_of_2

STATISTICS = LaunchConfig(warps=8, block=4096)
GRADIENT = LaunchConfig(warps=4, block=2048)


@triton.jit
def _mapped(x, SCALE: tl.constexpr, CAP: tl.constexpr):
    """The logit that counts, ``cap * tanh(scale * x / cap)``, and its derivative."""
    z = x * SCALE
    slope = tl.zeros_like(x) + SCALE
    if CAP != 0.0:
        # By exp(-2 |y|), which neither overflows nor cancels in the derivative.
        y = z * (1.0 / CAP)
        e = tl.exp(-2.0 * tl.abs(y))
        inverse = 1.0 / (1.0 + e)
        size = (1.0 - e) * inverse
        z = CAP * tl.where(y < 0, -size, size)
        slope = 4.0 * SCALE * e * inverse * inverse
    return z, slope


@triton.jit
def statistics_kernel(
    logits_ptr,  # [T, v]
    labels_ptr,  # [T] int64
    out_ptr,  # [3, T] float32
    tokens,
    columns,
    row_stride,
    start,
    ignore_index,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: peak, sum of exponentials, target."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    line = logits_ptr + row * row_stride
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((), float("-inf"), tl.float32)
    exps = tl.zeros([BLOCK], tl.float32)
    # A row that does not count is not read.
    limit = tl.where(counted, columns, 0)
    for first in range(0, limit, BLOCK):
        inside = first + lanes < columns
        x = tl.load(line + first + lanes, mask=inside, other=0.0).to(tl.float32)
        z, _ = _mapped(x, SCALE, CAP)
        z = tl.where(inside, z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, 0))
        # A row of -inf so far adds nothing; -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        exps = exps * tl.exp(peak - shift) + tl.exp(z - shift)
        peak = higher
    column = label - start
    here = counted & (column >= 0) & (column < columns)
    x = tl.load(line + column, mask=here, other=0.0).to(tl.float32)
    target, _ = _mapped(x, SCALE, CAP)
    tl.store(out_ptr + row, peak)
    tl.store(out_ptr + tokens + row, tl.sum(exps, 0))
    tl.store(out_ptr + 2 * tokens + row, tl.where(here, target, 0.0))


@triton.jit
def gradient_kernel(
    logits_ptr,  # [T, v]
    out_ptr,  # [T, v], may be the logits
    labels_ptr,  # [T] int64
    peak_ptr,  # [T] float32, over all ranks
    sum_ptr,  # [T] float32, over all ranks
    dloss_ptr,  # [T] or one number, float32
    columns,
    row_stride,
    out_stride,
    dloss_stride,
    start,
    ignore_index,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    HAS_DLOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of columns of one row: ``slope * dloss * (p - onehot)``."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    read = lanes < tl.where(counted, columns, 0)
    x = tl.load(logits_ptr + row * row_stride + lanes, mask=read, other=0.0)
    z, slope = _mapped(x.to(tl.float32), SCALE, CAP)
    total = tl.where(counted, tl.load(sum_ptr + row), 1.0)
    grad = tl.exp(z - tl.load(peak_ptr + row)) * (1.0 / total)
    grad -= tl.where(lanes == label - start, 1.0, 0.0)
    grad *= slope
    if HAS_DLOSS:
        grad *= tl.load(dloss_ptr + row * dloss_stride)
    # By mask, not by product: what an ignored row holds must not reach the gradient.
    grad = tl.where(counted, grad, 0.0)
    out = grad.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + lanes, out, mask=lanes < columns)


def launch_statistics(
    logits_Tv: Tensor, labels_T: Tensor, terms: LossTerms, config: LaunchConfig | None = None
) -> Tensor:
    """Statistics ``[3, T]`` in float32 of logits with columns side by side; T and v not 0."""
    T, v = logits_Tv.shape
    config = config or STATISTICS
    out = logits_Tv.new_empty((3, T), dtype=torch.float32)
    dispatch.launch(
        statistics_kernel,
        (T,),
        logits_Tv,
        labels_T,
        out,
        T,
        v,
        logits_Tv.stride(0),
        terms.start,
        terms.ignore_index,
        SCALE=terms.scale,
        CAP=terms.softcap or 0.0,
        BLOCK=_block(config, v),
        num_warps=config.warps,
    )
    return out


def launch_gradient(
    logits_Tv: Tensor,
    out_Tv: Tensor,
    labels_T: Tensor,
    whole: Combined,
    dloss: Tensor | None,
    terms: LossTerms,
    config: LaunchConfig | None = None,
) -> None:
    """Write the gradient into ``out``, which may be the logits; ``dloss`` in float32."""
    T, v = logits_Tv.shape
    config = config or GRADIENT
    block = _block(config, v)
    dispatch.launch(
        gradient_kernel,
        (T, triton.cdiv(v, block)),
        logits_Tv,
        out_Tv,
        labels_T,
        whole.peak,
        whole.sum,
        whole.peak if dloss is None else dloss,
        v,
        logits_Tv.stride(0),
        out_Tv.stride(0),
        0 if dloss is None or dloss.dim() == 0 else dloss.stride(0),
        terms.start,
        terms.ignore_index,
        SCALE=terms.scale,
        CAP=terms.softcap or 0.0,
        HAS_DLOSS=dloss is not None,
        BLOCK=block,
        num_warps=config.warps,
    )


def _block(config: LaunchConfig, columns: int) -> int:
    # No wider than the row: small vocabularies pay for every lane.
    return min(config.block, max(16, next_power_of_2(columns)))
