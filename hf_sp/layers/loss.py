"""Chunked, vocab-parallel cross entropy over the LM head: whole logits never exist.

For each chunk of tokens: logits of the local vocabulary rows, their max, sum of exponentials and
target logit, one small all-gather of these three, then the gradient in place, its product with the
head and the reduction of that to where the hidden states live. Nothing of the size tokens x
vocabulary outlives a chunk.

Gradients are made in the forward (three matrix products, none repeated) without the loss's scale:
``p - onehot`` is of order one, so that half precision neither under- nor overflows; the scale
``grad_output / denominator`` is applied once in backward.

Shape letters: T tokens of a chunk (of all ranks), H hidden, V vocabulary, v local vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_sp import collectives as comm
from hf_sp.collectives import Axis


@dataclass(frozen=True, slots=True)
class LossSpec:
    """What the loss needs besides tensors.

    Args:
        axis: the tp axis.
        sharded: whether gradients go to sequence shards (else they are replicated).
        start: first vocabulary row of this rank.
        ignore_index: label of tokens that do not count.
        chunk: tokens per chunk, over all ranks.
    """

    axis: Axis
    sharded: bool
    start: int
    ignore_index: int
    chunk: int


def linear_cross_entropy(
    source: Tensor,
    full_BSH: Tensor,
    weight_vH: Tensor,
    bias_v: Tensor | None,
    labels_BS: Tensor,
    spec: LossSpec,
) -> Tensor:
    """Summed cross entropy of ``full W^T + b`` against labels that are shifted already.

    Shapes:   source [B, s, H] shard (``sharded``) or [B, S, H] replicated: takes the gradient;
              full [B, S, H] its gathered value; weight [v, H]; labels [B, S] -> scalar, equal on
              all ranks
    dtype:    logits in the dtype of full and weight, statistics in float32 (float64 for float64)
    Forward:  per chunk 1 all-gather of [3, T] statistics and 1 reduce-scatter (``sharded``) or
              all-reduce of the [T, H] gradient; without grad mode only the all-gather
    Backward: no collective
    Saves:    the gradients: source's shape, [v, H], [v]
    Source:   Liu et al., Liger Kernel, arXiv:2410.10989, section 3.2 (gradients in the forward)
    """
    return _LinearCrossEntropy.apply(source, full_BSH.detach(), weight_vH, bias_v, labels_BS, spec)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        full_BSH: Tensor,
        weight_vH: Tensor,
        bias_v: Tensor | None,
        labels_BS: Tensor,
        spec: LossSpec,
    ) -> Tensor:
        wide = torch.promote_types(full_BSH.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=full_BSH.device)
        needs_source, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        dsource = torch.zeros_like(source) if needs_source else None
        dweight = torch.zeros_like(weight_vH, dtype=wide) if needs_weight else None
        dbias = weight_vH.new_zeros(weight_vH.shape[0], dtype=wide) if needs_bias else None
        for x_TH, labels_T, where in _chunks(full_BSH, labels_BS, spec):
            logits_Tv = torch.nn.functional.linear(x_TH, weight_vH, bias_v)
            loss_T, grad_Tv = _statistics(logits_Tv, labels_T, spec, any(ctx.needs_input_grad))
            total += loss_T.sum()
            if grad_Tv is None:
                continue
            grad_Tv = grad_Tv.to(logits_Tv.dtype)
            if dweight is not None:
                dweight += grad_Tv.t() @ x_TH
            if dbias is not None:
                dbias += grad_Tv.sum(0)
            if dsource is not None:
                _store(dsource, grad_Tv @ weight_vH, where, spec)
        if dweight is not None and weight_vH.dtype != torch.float16:
            # float16 keeps its sum over many tokens in float32 until the scale makes it small.
            dweight = dweight.to(weight_vH.dtype)
        ctx.save_for_backward(dsource, dweight, dbias)
        ctx.dtypes = source.dtype, weight_vH.dtype, weight_vH.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Once: under checkpointing saved tensors can be unpacked a single time.
        saved = ctx.saved_tensors
        scaled = [
            None if grad is None else (grad * grads[0].to(_at_least_float(grad))).to(dtype)
            for grad, dtype in zip(saved, ctx.dtypes, strict=True)
        ]
        dsource, dweight, dbias = scaled
        return dsource, None, dweight, dbias, None, None


def _at_least_float(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def scaled_loss(total: Tensor, items: Tensor | float) -> Tensor:
    """``total / items``, and a gradient of zero where ``items`` is zero.

    torch's cross entropy writes no gradient for ignored tokens, so that a batch without a counted
    label trains nothing; dividing by its count would make every gradient nan.
    """
    if not isinstance(items, Tensor):
        items = total.new_tensor(float(items))
    counted = items != 0
    return (total / items.masked_fill(~counted, 1)).where(counted, total.detach() / items)


def _chunks(
    full_BSH: Tensor, labels_BS: Tensor, spec: LossSpec
) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
    """Pieces of the tokens with their labels and the rows of the source they are gathered from.

    Sharded: rows [a, b) of every rank's shard, so that each chunk's gradient reduce-scatters to
    the same rows on each rank. Padding rows get the label to ignore.
    """
    B, S, H = full_BSH.shape
    size = spec.axis.size if spec.sharded else 1
    s = comm.padded(S, size) // size
    rows = max(1, spec.chunk // (B * size))
    for a in range(0, s, rows):
        b = min(a + rows, s)
        x, y = [], []
        for rank in range(size):
            low, high = min(rank * s + a, S), min(rank * s + b, S)
            x.append(full_BSH[:, low:high].transpose(0, 1))
            y.append(labels_BS[:, low:high].t())
            missing = (b - a) - (high - low)
            if missing:
                x.append(full_BSH.new_zeros(missing, B, H))
                y.append(labels_BS.new_full((missing, B), spec.ignore_index))
        x_TH = (x[0] if len(x) == 1 else torch.cat(x)).reshape(-1, H)
        yield x_TH, torch.cat(y).reshape(-1), (a, b)


def _store(dsource: Tensor, dx_TH: Tensor, where: tuple[int, int], spec: LossSpec) -> None:
    """Reduce a chunk's partial gradient into its rows of the source's gradient."""
    a, b = where
    B, H = dsource.shape[0], dsource.shape[2]
    reduce = comm.reduce_scatter if spec.sharded else comm.all_reduce
    dsource[:, a:b] = reduce(dx_TH, spec.axis).view(b - a, B, H).transpose(0, 1)


def _statistics(
    logits_Tv: Tensor, labels_T: Tensor, spec: LossSpec, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Per-token loss ``[T]`` and its gradient ``softmax - onehot`` ``[T, v]``, both wide."""
    wide = torch.promote_types(logits_Tv.dtype, torch.float32)
    # A copy in any case: it becomes the gradient in place.
    work_Tv = logits_Tv.to(wide, copy=True)
    T, v = work_Tv.shape
    counted = labels_T != spec.ignore_index
    here = counted & (labels_T >= spec.start) & (labels_T < spec.start + v)
    index = (labels_T - spec.start).masked_fill(~here, 0)
    if v:
        peak_T = work_Tv.amax(1)
        target_T = work_Tv.gather(1, index.unsqueeze(1)).squeeze(1).masked_fill(~here, 0)
        # A row of -inf (all logits masked out on this rank) adds nothing to the sum.
        shift_T = peak_T.masked_fill(peak_T == -torch.inf, 0)
        work_Tv.sub_(shift_T.unsqueeze(1)).exp_()
        sum_T = work_Tv.sum(1)
    else:
        # A vocabulary smaller than tp leaves ranks without rows.
        shift_T = peak_T = work_Tv.new_full((T,), -torch.inf)
        sum_T = target_T = work_Tv.new_zeros(T)
    # [tp, 3, T]: every rank combines the same numbers in the same order, so that the loss is
    # bit-equal on all of them.
    stats = comm.all_gather(torch.stack([peak_T, sum_T, target_T])[None], spec.axis)
    peaks, sums, targets = stats.unbind(1)
    peak_all_T = peaks.amax(0)
    peak_all_T = peak_all_T.masked_fill(peak_all_T == -torch.inf, 0)
    sum_all_T = (sums * (peaks - peak_all_T).exp()).sum(0)
    loss_T = (sum_all_T.log() + peak_all_T - targets.sum(0)).masked_fill(~counted, 0)
    if not needs_grad:
        return loss_T, None
    if v:
        work_Tv.mul_(((shift_T - peak_all_T).exp() / sum_all_T).unsqueeze(1))
        work_Tv.scatter_add_(1, index.unsqueeze(1), -here.to(wide).unsqueeze(1))
        # By mask, not by product: a NaN in an ignored row must not reach the gradient.
        work_Tv.masked_fill_(~counted.unsqueeze(1), 0)
    return loss_T, work_Tv
