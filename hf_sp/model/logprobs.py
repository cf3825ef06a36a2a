"""Per-token log-probabilities and statistics of a vocab-parallel head, without whole logits.

For losses that are not the mean cross entropy (weighted tokens, preference pairs): the gradient of
each token's log-probability comes from outside, so that the logits of a chunk are made again in
backward. Nothing of the size tokens x vocabulary outlives a chunk.

Shape letters: B batch, S sequence, s = S / tp padded, T tokens of a chunk (of all ranks), H hidden,
V vocabulary, v local vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import once_differentiable
from hf_sp.comm.collectives import Axis

FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What can be asked for beside the log-probabilities."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What the statistics need besides tensors.

    Args:
        axis: the tp axis.
        sharded: whether gradients go to sequence shards (else they are replicated).
        start: first vocabulary row of this rank.
        vocab: rows of the whole vocabulary.
        chunk: tokens per chunk, over all ranks.
        scale: logits are multiplied by it first.
        cap: then squashed to ``cap tanh(x / cap)``; None for not.
        temperature: then divided by it.
        fields: which of ``FIELDS`` are computed.
    """

    axis: Axis
    sharded: bool
    start: int
    vocab: int
    chunk: int
    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0
    fields: tuple[str, ...] = FIELDS


class TokenStatistics(NamedTuple):
    """Each ``[B, S]``, equal on all ranks; None for what was not asked for.

    Gradients flow into ``log_probs`` and ``entropy``. Tokens that do not count hold zeros.
    """

    log_probs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


def token_statistics(
    source: Tensor,
    full_BSH: Tensor,
    weight_vH: Tensor,
    bias_v: Tensor | None,
    labels_BS: Tensor,
    spec: Spec,
    ignore_index: int = -100,
) -> TokenStatistics:
    """Log-probability of each label under the head's distribution, and what describes that.

    Shapes:   source [B, s, H] shard (``sharded``) or [B, S, H] replicated: takes the gradient;
              full [B, S, H] its gathered value; weight [v, H]; labels [B, S], shifted already
    dtype:    logits in the dtype of full and weight, statistics in float32 (float64 for float64)
    Forward:  per chunk 1 all-gather of at most [7, T] statistics
    Backward: per chunk 1 reduce-scatter (``sharded``; and 1 all-gather of the chunk's hidden
              states) or 1 all-reduce of [T, H]
    Saves:    source, weight, and two numbers a token

    Args:
        source: what the hidden states were gathered from.
        full_BSH: the hidden states.
        weight_vH: local rows of the head.
        bias_v: their bias.
        labels_BS: the label of each position.
        spec: everything else.
        ignore_index: label of tokens that do not count.
    """
    return TokenStatistics(
        *_TokenStatistics.apply(
            source, full_BSH.detach(), weight_vH, bias_v, labels_BS, spec, ignore_index
        )
    )


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        full_BSH: Tensor,
        weight_vH: Tensor,
        bias_v: Tensor | None,
        labels_BS: Tensor,
        spec: Spec,
        ignore_index: int,
    ) -> Any:
        ctx.set_materialize_grads(False)
        layout = _Layout(full_BSH.shape[0], full_BSH.shape[1], spec)
        hidden, labels = layout.pad(full_BSH), layout.pad(labels_BS, ignore_index)
        wide = torch.promote_types(full_BSH.dtype, torch.float32)
        names = ("log_probs", "log_z", *spec.fields)
        found = {n: full_BSH.new_zeros(labels.shape, dtype=wide) for n in names}
        for a, b in layout.chunks():
            x_TH = hidden[:, a:b].reshape(-1, hidden.shape[-1])
            labels_T = labels[:, a:b].reshape(-1)
            z_Tv, _ = _transformed(F.linear(x_TH, weight_vH, bias_v), spec, wide)
            for name, value in _statistics(z_Tv, labels_T, spec).items():
                counted = labels_T != ignore_index
                found[name][:, a:b] = value.masked_fill(~counted, 0).view_as(labels[:, a:b])
        # Without an entropy there is no gradient of it: log_z fills the place.
        kept = found.get("entropy", found["log_z"])
        ctx.save_for_backward(source, weight_vH, bias_v, labels, found["log_z"], kept)
        ctx.spec, ctx.layout, ctx.ignore_index, ctx.dtype = spec, layout, ignore_index, wide
        out = [layout.strip(found[n]) if n in found else None for n in ("log_probs", *FIELDS)]
        if out[4] is not None:
            out[4] = out[4] > 0
        ctx.mark_non_differentiable(*(x for x in out[2:] if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        source, weight, bias, labels, log_z, entropy = ctx.saved_tensors
        spec, layout, wide = ctx.spec, ctx.layout, ctx.dtype
        needs_source, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        dsource = torch.zeros_like(source) if needs_source else None
        dweight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        dbias = weight.new_zeros(weight.shape[0], dtype=wide) if needs_bias else None
        upstream = [None if g is None else layout.pad(g.to(wide)) for g in grads[:2]]
        whole = None if spec.sharded else layout.pad(source)
        for a, b in layout.chunks():
            if whole is None:
                x = comm.all_gather(source.transpose(0, 1)[a:b], spec.axis)
            else:
                x = whole[:, a:b]
            x_TH = x.reshape(-1, x.shape[-1])
            labels_T = labels[:, a:b].reshape(-1)
            z_Tv, slope = _transformed(F.linear(x_TH, weight, bias), spec, wide)
            here = [t[:, a:b].reshape(-1, 1) for t in (log_z, entropy)]
            g = [None if u is None else u[:, a:b].reshape(-1, 1) for u in upstream]
            grad_Tv = _logits_gradient(z_Tv, labels_T, here, g, spec)
            grad_Tv = grad_Tv * slope
            # By mask, not by product: a NaN in an ignored row must not reach the gradient.
            ignored = (labels_T == ctx.ignore_index).unsqueeze(1)
            grad_Tv = grad_Tv.masked_fill(ignored, 0).to(x_TH.dtype)
            if dweight is not None:
                dweight += grad_Tv.t() @ x_TH.masked_fill(ignored, 0)
            if dbias is not None:
                dbias += grad_Tv.sum(0)
            if dsource is not None:
                reduce = comm.reduce_scatter if spec.sharded else comm.all_reduce
                dx = reduce(grad_Tv @ weight, spec.axis)
                stop = min(b, dsource.shape[1])
                dsource[:, a:stop] = dx.view(b - a, -1, dx.shape[-1]).transpose(0, 1)[:, : stop - a]
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        if dbias is not None:
            dbias = dbias.to(weight.dtype)
        return dsource, None, dweight, dbias, None, None, None


class _Layout:
    """Tokens as ``[owners, rows, B]``: rows [a, b) of every owner make a chunk.

    Sharded, the owners are the ranks, so that a chunk's gradient reduce-scatters to the same rows
    on each; else there is one.
    """

    def __init__(self, batch: int, length: int, spec: Spec) -> None:
        self.owners = spec.axis.size if spec.sharded else 1
        self.length = length
        self.height = comm.padded(length, self.owners) // self.owners
        self.rows = max(1, spec.chunk // (batch * self.owners))

    def chunks(self) -> Iterator[tuple[int, int]]:
        for a in range(0, self.height, self.rows):
            yield a, min(a + self.rows, self.height)

    def pad(self, x_BS: Tensor, value: float = 0) -> Tensor:
        x = x_BS.transpose(0, 1)
        missing = self.owners * self.height - self.length
        if missing:
            x = torch.cat([x, x.new_full((missing, *x.shape[1:]), value)])
        return x.unflatten(0, (self.owners, self.height))

    def strip(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)[: self.length].transpose(0, 1).contiguous()


def _transformed(logits_Tv: Tensor, spec: Spec, wide: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """The logits as the distribution sees them, and their derivative by the projection's output."""
    y = logits_Tv.to(wide) * spec.scale
    slope = spec.scale / spec.temperature
    if spec.cap is None:
        return y / spec.temperature, slope
    squashed = torch.tanh(y / spec.cap)
    return spec.cap * squashed / spec.temperature, slope * (1 - squashed * squashed)


def _statistics(z_Tv: Tensor, labels_T: Tensor, spec: Spec) -> dict[str, Tensor]:
    """Statistics of each token, from one all-gather of every rank's own."""
    T, v = z_Tv.shape
    here = (labels_T >= spec.start) & (labels_T < spec.start + v)
    index = (labels_T - spec.start).masked_fill(~here, 0)
    low = z_Tv.new_full((T,), -torch.inf)
    zero = z_Tv.new_zeros(T)
    if v:
        peak = z_Tv.amax(1)
        e = (z_Tv - peak.masked_fill(peak == -torch.inf, 0).unsqueeze(1)).exp()
        mine = [peak, e.sum(1), z_Tv.gather(1, index.unsqueeze(1)).squeeze(1).masked_fill(~here, 0)]
    else:
        mine, e = [low, zero, zero], z_Tv
    if "entropy" in spec.fields:
        # 0 * -inf where a logit is masked out.
        mine.append((e * z_Tv.masked_fill(z_Tv == -torch.inf, 0)).sum(1))
    if "log_sum_sq_probs" in spec.fields:
        mine.append((e * e).sum(1))
    if "mean_logits" in spec.fields:
        mine.append(z_Tv.sum(1))
    if "is_top1" in spec.fields:
        # The first of equal maxima is the prediction: the best logit before the label.
        before = torch.arange(v, device=z_Tv.device) + spec.start < labels_T.unsqueeze(1)
        mine.append(z_Tv.masked_fill(~before, -torch.inf).amax(1) if v else low)
    # [tp, k, T]: every rank combines the same numbers in the same order.
    gathered = iter(comm.all_gather(torch.stack(mine)[None], spec.axis).unbind(1))
    peaks, sums, targets = next(gathered), next(gathered), next(gathered).sum(0)
    peak = peaks.amax(0)
    weight = (peaks - peak).exp()
    total = (sums * weight).sum(0)
    log_z = peak + total.log()
    found = {"log_z": log_z, "log_probs": targets - log_z}
    if "entropy" in spec.fields:
        found["entropy"] = log_z - (next(gathered) * weight).sum(0) / total
    if "log_sum_sq_probs" in spec.fields:
        found["log_sum_sq_probs"] = (next(gathered) * weight * weight).sum(
            0
        ).log() - 2 * total.log()
    if "mean_logits" in spec.fields:
        found["mean_logits"] = next(gathered).sum(0) / spec.vocab
    if "is_top1" in spec.fields:
        first = next(gathered).amax(0)
        found["is_top1"] = ((targets >= peak) & (targets > first)).to(log_z.dtype)
    return found


def _logits_gradient(
    z_Tv: Tensor,
    labels_T: Tensor,
    saved: list[Tensor],
    upstream: list[Tensor | None],
    spec: Spec,
) -> Tensor:
    """Gradient by the transformed logits, of the log-probability and of the entropy."""
    log_z, entropy = saved
    log_p = z_Tv - log_z
    p = log_p.exp()
    grad = torch.zeros_like(z_Tv)
    of_log_prob, of_entropy = upstream
    if of_log_prob is not None:
        v = z_Tv.shape[1]
        here = (labels_T >= spec.start) & (labels_T < spec.start + v)
        grad -= of_log_prob * p
        if v:
            index = (labels_T - spec.start).masked_fill(~here, 0).unsqueeze(1)
            grad.scatter_add_(1, index, of_log_prob.masked_fill(~here.unsqueeze(1), 0))
    if of_entropy is not None:
        grad -= of_entropy * p * (log_p + entropy)
    return grad
