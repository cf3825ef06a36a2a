"""Per-token log-probabilities and statistics of a vocab-parallel head, without whole logits.

For losses that are not the mean cross entropy (weighted tokens, preference pairs): the gradient of
each token's log-probability comes from outside, so that the logits of a chunk are made again in
backward (``hf_sp.model.chunks``; ``hf_sp.model.loss`` is the other user of these).

Shape letters: B batch, S sequence, s = ceil(S / tp), T tokens of a chunk (of all ranks), H hidden,
v local vocabulary rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.kernels import cross_entropy_steps as steps
from hf_sp.model.chunks import Chunks, HeadGradients, HeadSpec

FIELDS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What can be asked for beside the log-probabilities."""


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
    hidden: Tensor,
    weight_vH: Tensor,
    bias_v: Tensor | None,
    labels_BS: Tensor,
    spec: HeadSpec,
    fields: tuple[str, ...] = FIELDS,
) -> TokenStatistics:
    """Log-probability of each label under the head's distribution, and what describes that.

    Shapes:   hidden [B, s, H] shard (``sharded``) or [B, S, H] replicated; weight [v, H], local
              rows of the head; bias [v]; labels [B, S], shifted already
    dtype:    logits in the dtype of hidden and weight, statistics in float32 (float64 for float64)
    Forward:  per chunk 1 all-gather of [T, H] (``sharded``) and 1 of at most [7, T] statistics
    Backward: per chunk 1 all-gather and 1 reduce-scatter (``sharded``), or 1 all-reduce of [T, H]
    Saves:    hidden, weight, labels and two numbers a token

    Args:
        hidden: final hidden states.
        weight_vH: local rows of the head.
        bias_v: their bias.
        labels_BS: the label of each position.
        spec: everything else.
        fields: which of ``FIELDS`` are computed.
    """
    found = _TokenStatistics.apply(hidden, weight_vH, bias_v, labels_BS, spec, fields)
    return TokenStatistics(*found)


class _TokenStatistics(Node):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight_vH: Tensor,
        bias_v: Tensor | None,
        labels_BS: Tensor,
        spec: HeadSpec,
        fields: tuple[str, ...],
    ) -> Any:
        ctx.set_materialize_grads(False)
        chunks = Chunks(hidden, labels_BS, spec)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        shape = chunks.labels_RsB.shape
        found = {n: hidden.new_zeros(shape, dtype=wide) for n in ("log_probs", "log_z", *fields)}
        for x_TH, labels_T, rows in chunks:
            logits_Tv = F.linear(x_TH, weight_vH, bias_v)
            for name, value in _statistics(logits_Tv, labels_T, spec, fields).items():
                ignored = labels_T == spec.terms.ignore_index
                part = found[name][:, rows]
                part.copy_(value.masked_fill(ignored, 0).view_as(part))
            del logits_Tv, x_TH
        # Without an entropy there is no gradient of it: log_z fills the place.
        kept = found.get("entropy", found["log_z"])
        ctx.save_for_backward(hidden, weight_vH, bias_v, labels_BS, found["log_z"], kept)
        ctx.spec = spec
        out = [chunks.join(found[n]) if n in found else None for n in ("log_probs", *FIELDS)]
        if out[4] is not None:
            out[4] = out[4] > 0
        ctx.mark_non_differentiable(*(x for x in out[2:] if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        hidden, weight, bias, labels_BS, log_z, entropy = ctx.saved_tensors
        chunks = Chunks(hidden, labels_BS, ctx.spec)
        sums = HeadGradients(chunks, weight, ctx.needs_input_grad[:3])
        of_log_prob, of_entropy = (
            None if g is None else chunks.split(g.to(log_z.dtype)) for g in grads[:2]
        )
        for x_TH, labels_T, rows in chunks:
            logits_Tv = F.linear(x_TH, weight, bias)
            saved = [t[:, rows].reshape(-1) for t in (log_z, entropy)]
            upstream = [
                None if g is None else g[:, rows].reshape(-1) for g in (of_log_prob, of_entropy)
            ]
            grad_Tv = _logits_gradient(logits_Tv, labels_T, saved, upstream, ctx.spec.terms)
            sums.add(grad_Tv, x_TH, rows)
            del logits_Tv, grad_Tv, x_TH
        dweight, dbias = (None if g is None else g.to(weight.dtype) for g in (sums.head, sums.bias))
        return sums.source, dweight, dbias, None, None, None


def _distribution(logits_Tv: Tensor, terms: steps.LossTerms) -> Tensor:
    """The logits that count, wide."""
    z_Tv = logits_Tv.to(torch.promote_types(logits_Tv.dtype, torch.float32)) * terms.scale
    return z_Tv if terms.softcap is None else terms.softcap * torch.tanh(z_Tv / terms.softcap)


def _statistics(
    logits_Tv: Tensor, labels_T: Tensor, spec: HeadSpec, fields: tuple[str, ...]
) -> dict[str, Tensor]:
    """Statistics of each token ``[T]``, from one all-gather of every rank's own."""
    terms, v = spec.terms, logits_Tv.shape[1]
    own = steps.token_statistics(logits_Tv, labels_T, terms)
    more: dict[str, Tensor] = {}
    if fields:
        z_Tv, peak_T = _distribution(logits_Tv, terms), own[0]
        e_Tv = (z_Tv - peak_T.masked_fill(peak_T == -torch.inf, 0).unsqueeze(1)).exp()
    if "entropy" in fields:
        # 0 * -inf where a logit is masked out.
        more["entropy"] = (e_Tv * z_Tv.masked_fill(z_Tv == -torch.inf, 0)).sum(1)
    if "log_sum_sq_probs" in fields:
        more["log_sum_sq_probs"] = (e_Tv * e_Tv).sum(1)
    if "mean_logits" in fields:
        more["mean_logits"] = z_Tv.sum(1)
    if "is_top1" in fields:
        # The first of equal maxima is the prediction: the best logit before the label.
        before = torch.arange(v, device=z_Tv.device) + terms.start < labels_T.unsqueeze(1)
        more["is_top1"] = z_Tv.masked_fill(~before, -torch.inf).amax(1) if v else peak_T
    # [tp, k, T]: every rank combines the same numbers in the same order.
    stats = steps.share(torch.cat([own, *(x[None] for x in more.values())]), spec.axis)
    whole = steps.combine(stats[:, :3], labels_T, terms)
    others = dict(zip(more, stats[:, 3:].unbind(1), strict=True))
    found = {"log_z": whole.peak + whole.sum.log(), "log_probs": -whole.loss}
    weight = (stats[:, 0] - whole.peak).exp()
    if "entropy" in fields:
        found["entropy"] = found["log_z"] - (others["entropy"] * weight).sum(0) / whole.sum
    if "log_sum_sq_probs" in fields:
        squares = (others["log_sum_sq_probs"] * weight * weight).sum(0)
        found["log_sum_sq_probs"] = squares.log() - 2 * whole.sum.log()
    if "mean_logits" in fields:
        found["mean_logits"] = others["mean_logits"].sum(0) / terms.vocab
    if "is_top1" in fields:
        target, first = stats[:, 2].sum(0), others["is_top1"].amax(0)
        found["is_top1"] = ((target >= whole.peak) & (target > first)).to(target.dtype)
    return found


def _logits_gradient(
    logits_Tv: Tensor,
    labels_T: Tensor,
    saved: list[Tensor],
    upstream: list[Tensor | None],
    terms: steps.LossTerms,
) -> Tensor:
    """Gradient by the logits, of the log-probability and of the entropy, in the logits' place."""
    (log_z, entropy), (of_log_prob, of_entropy) = saved, upstream
    more = None
    if of_entropy is not None:
        z_Tv = _distribution(logits_Tv, terms)
        log_p = z_Tv - log_z.unsqueeze(1)
        more = log_p.exp() * (log_p + entropy.unsqueeze(1)) * -(of_entropy * terms.scale)[:, None]
        if terms.softcap is not None:
            more *= 1 - (z_Tv / terms.softcap).square()
        # By mask, not by product: a NaN in an ignored row must not reach the gradient.
        more = more.masked_fill((labels_T == terms.ignore_index).unsqueeze(1), 0)
    whole = steps.Combined(log_z, log_z, torch.ones_like(log_z))
    dloss = torch.zeros_like(log_z) if of_log_prob is None else -of_log_prob
    grad_Tv = steps.write_gradient(logits_Tv, labels_T, whole, terms, dloss=dloss)
    return grad_Tv if more is None else grad_Tv.add_(more)
