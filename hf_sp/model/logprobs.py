"""Per-token log-probabilities and statistics of a vocab-parallel head, without whole logits.

For losses that are not the mean cross entropy (weighted tokens, preference pairs): the gradient of
each token's log-probability comes from outside, so that the logits of a chunk are made again in
backward.

Shape letters: as in ``hf_sp.model.chunks``.
"""

from __future__ import annotations

from collections.abc import Callable
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
    Only those of ``FIELDS`` are computed that are asked for.
    """
    found = _TokenStatistics.apply(hidden, weight_vH, bias_v, labels_BS, spec, fields)
    return TokenStatistics(*found)


class _TokenStatistics(Node):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        hidden, weight_vH, bias_v, labels_BS, spec, fields = inputs
        ctx.set_materialize_grads(False)
        chunks = Chunks(hidden, labels_BS, spec)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        shape = chunks.labels_RsB.shape
        found = {n: hidden.new_zeros(shape, dtype=wide) for n in ("log_probs", "log_z", *fields)}
        for x_TH, labels_T, rows in chunks:
            logits_Tv = F.linear(x_TH, weight_vH, bias_v)
            for name, value in _statistics(logits_Tv, labels_T, spec, fields).items():
                part = found[name][:, rows]
                value = value.masked_fill(labels_T == spec.terms.ignore_index, 0)
                part.copy_(value.view_as(part))
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
        upstream = (None if g is None else chunks.split(g.to(log_z.dtype)) for g in grads[:2])
        whole = (log_z, entropy, *upstream)
        for x_TH, labels_T, rows in chunks:
            logits_Tv = F.linear(x_TH, weight, bias)
            of_tokens = (None if t is None else t[:, rows].reshape(-1) for t in whole)
            grad_Tv = _logits_gradient(logits_Tv, labels_T, ctx.spec.terms, *of_tokens)
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
    if fields:
        peak_T, z_Tv = own[0], _distribution(logits_Tv, terms)
        e_Tv = (z_Tv - peak_T.masked_fill(peak_T == -torch.inf, 0).unsqueeze(1)).exp()
        column_v = torch.arange(v, device=z_Tv.device) + terms.start
        parts: dict[str, Callable[[], Tensor]] = {
            # 0 * -inf where a logit is masked out.
            "entropy": lambda: (e_Tv * z_Tv.masked_fill(z_Tv == -torch.inf, 0)).sum(1),
            "log_sum_sq_probs": lambda: (e_Tv * e_Tv).sum(1),
            "mean_logits": lambda: z_Tv.sum(1),
            # The first of equal maxima is the prediction: the best logit before the label.
            "is_top1": lambda: (
                z_Tv.masked_fill(column_v >= labels_T[:, None], -torch.inf).amax(1) if v else peak_T
            ),
        }
        own = torch.cat([own, *(parts[name]()[None] for name in fields)])
    # [tp, k, T]: every rank combines the same numbers in the same order.
    stats = steps.share(own, spec.axis)
    whole = steps.combine(stats[:, :3], labels_T, terms)
    log_z, weight = whole.peak + whole.sum.log(), (stats[:, 0] - whole.peak).exp()
    target = stats[:, 2].sum(0)
    wholes: dict[str, Callable[[Tensor], Tensor]] = {
        "entropy": lambda x: log_z - (x * weight).sum(0) / whole.sum,
        "log_sum_sq_probs": lambda x: (x * weight * weight).sum(0).log() - 2 * whole.sum.log(),
        "mean_logits": lambda x: x.sum(0) / terms.vocab,
        "is_top1": lambda x: ((target >= whole.peak) & (target > x.amax(0))).to(x.dtype),
    }
    more = {name: wholes[name](x) for name, x in zip(fields, stats[:, 3:].unbind(1), strict=True)}
    return {"log_z": log_z, "log_probs": -whole.loss, **more}


def _logits_gradient(
    logits_Tv: Tensor, labels_T: Tensor, terms: steps.LossTerms, *of_tokens: Any
) -> Tensor:
    """Gradient by the logits, of the log-probability and of the entropy, in the logits' place."""
    log_z, entropy, of_log_prob, of_entropy = of_tokens
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
