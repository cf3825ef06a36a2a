"""The three steps of the vocab-parallel cross entropy, for logits of one's own to overwrite.

Statistics of the local columns, their combination over the ranks, the gradient. Must not know
autograd, modules, sequence shards, how the logits came to be.

Shape letters: T tokens, V vocabulary, v local vocabulary columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import hf_sp.kernels.launch as dispatch
from hf_sp.comm import collectives as comm
from hf_sp.comm.collectives import Axis
from hf_sp.errors import ConfigError
from hf_sp.kernels.table import LaunchConfig
from hf_sp.torch_private import is_fake

# Elements that the torch code holds in float32 at a time: no second copy of the logits is made.
_SLAB = 2**20


@dataclass(frozen=True, slots=True)
class LossTerms:
    """The loss of one token, and where this rank's columns lie.

    ``z = softcap * tanh(scale * x / softcap)`` (``scale * x`` without a cap), then
    ``logsumexp(z) - z[label]``.

    ``vocab`` counts the columns of all ranks, ``start`` is this rank's first; the others are those
    of ``vocab_parallel_cross_entropy``.
    """

    vocab: int
    start: int = 0
    ignore_index: int = -100
    softcap: float | None = None
    scale: float = 1.0
    triton: bool = True

    def __post_init__(self) -> None:
        if self.softcap == 0:
            raise ConfigError(
                "a soft cap of 0 would make all logits equal",
                got="softcap=0",
                legal="a number other than 0, or None for no cap",
            )


class Combined(NamedTuple):
    """What all ranks know of their rows together; each ``[T]``, equal bits on all ranks."""

    loss: Tensor
    peak: Tensor
    sum: Tensor


def token_statistics(
    logits_Tv: Tensor, labels_T: Tensor, terms: LossTerms, config: LaunchConfig | None = None
) -> Tensor:
    """What this rank knows of each row: peak, ``sum(exp(z - peak))``, target.

    The target's logit counts on the rank that has its column and is 0 elsewhere. Rows to ignore may
    hold anything. ``config`` is for a sweep of the Triton kernel's settings.

    Shapes:   logits [T, v], this rank's columns; labels [T], global ids in int64 -> [3, T] in
              float32 (float64 for float64)
    Bytes:    each logit is read once
    """
    T, v = logits_Tv.shape
    wide = torch.promote_types(logits_Tv.dtype, torch.float32)
    if T == 0 or v == 0:
        # A vocabulary smaller than the group leaves ranks without columns.
        stats = logits_Tv.new_zeros((3, T), dtype=wide)
        stats[0].fill_(-torch.inf)
        return stats
    kernels = dispatch.cross_entropy_kernels(logits_Tv) if terms.triton else None
    if kernels is not None:
        return kernels.launch_statistics(_rows(logits_Tv), labels_T, terms, config)
    found: list[Tensor] = []
    for rows in _slabs(T, v):
        if found and is_fake(logits_Tv):
            # A count of bytes: the slabs are alike, and there may be thousands.
            found.append(found[0].new_empty(3, T - rows.start))
            break
        found.append(_slab_statistics(logits_Tv[rows], labels_T[rows], terms))
    return torch.cat(found, 1)


def share(stats: Tensor, axis: Axis | None) -> Tensor:
    """Statistics ``[3, T]`` of all ranks, ``[tp, 3, T]``: 1 all-gather of float32."""
    if axis is None or stats.shape[1] == 0:
        return stats[None]
    return comm.all_gather(stats[None], axis)


def combine(stats: Tensor, labels_T: Tensor, terms: LossTerms) -> Combined:
    """Each token's loss, and what its gradient needs, from the statistics ``[tp, 3, T]`` of all.

    Every rank does the same to the same numbers, so that the loss has the same bits on all.
    """
    peaks, sums, targets = stats.unbind(1)
    peak_T = peaks.amax(0)
    # Where all logits are -inf: exp(-inf - -inf) would turn the sum of 0 into NaN.
    peak_T = peak_T.masked_fill(peak_T == -torch.inf, 0)
    sum_T = (sums * (peaks - peak_T).exp()).sum(0)
    loss_T = sum_T.log() + peak_T
    loss_T -= targets.sum(0)
    return Combined(loss_T.masked_fill_(labels_T == terms.ignore_index, 0), peak_T, sum_T)


def write_gradient(
    logits_Tv: Tensor,
    labels_T: Tensor,
    whole: Combined,
    terms: LossTerms,
    *,
    dloss: Tensor | None = None,
    out: Tensor | None = None,
    config: LaunchConfig | None = None,
) -> Tensor:
    """Gradient of the logits, ``[T, v]`` in their dtype, rounded once; exact zeros if ignored.

    Each logit is read once and written once: to ``out``, or in the logits' place. ``whole`` is what
    ``combine`` returned, ``dloss`` the gradient of the losses, one number or ``[T]`` (None is 1).
    """
    T, v = logits_Tv.shape
    out = logits_Tv if out is None else out
    if T == 0 or v == 0:
        return out
    kernels = dispatch.cross_entropy_kernels(logits_Tv) if terms.triton else None
    if kernels is None:
        for rows in _slabs(T, v):
            up = dloss if dloss is None or dloss.dim() == 0 else dloss[rows]
            peak, total = whole.peak[rows], whole.sum[rows]
            out[rows] = _slab_gradient(logits_Tv[rows], labels_T[rows], peak, total, up, terms)
            if is_fake(logits_Tv):
                break
        return out
    straight = out.stride(1) == 1
    target = out if straight else torch.empty_like(out, memory_format=torch.contiguous_format)
    up = None if dloss is None else dloss.float()
    kernels.launch_gradient(_rows(logits_Tv), target, labels_T, whole, up, terms, config)
    return out if straight else out.copy_(target)


def _rows(x_Tv: Tensor) -> Tensor:
    return x_Tv if x_Tv.stride(1) == 1 else x_Tv.contiguous()


# --- the same in torch --------------------------------------------------------------------------


def _slabs(T: int, v: int) -> Iterator[slice]:
    step = max(1, _SLAB // v)
    return (slice(first, min(first + step, T)) for first in range(0, T, step))


def _mapped(x_Tv: Tensor, terms: LossTerms) -> Tensor:
    """The logits that count, wide; a contiguous copy: how torch 2.14 sums depends on strides."""
    wide = torch.promote_types(x_Tv.dtype, torch.float32)
    z_Tv = x_Tv.to(wide, copy=True, memory_format=torch.contiguous_format)
    if terms.scale != 1.0:
        z_Tv.mul_(terms.scale)
    return z_Tv if terms.softcap is None else z_Tv.div_(terms.softcap).tanh_().mul_(terms.softcap)


def _targets(labels_T: Tensor, v: int, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Column of each token's label here, ``[T, 1]``, and whether it is here, ``[T]``."""
    here_T = (labels_T >= terms.start) & (labels_T < terms.start + v)
    here_T &= labels_T != terms.ignore_index
    return (labels_T - terms.start).masked_fill(~here_T, 0).unsqueeze(1), here_T


def _slab_statistics(x_Tv: Tensor, labels_T: Tensor, terms: LossTerms) -> Tensor:
    z_Tv = _mapped(x_Tv, terms)
    index_T1, here_T = _targets(labels_T, z_Tv.shape[1], terms)
    peak_T = z_Tv.amax(1)
    target_T = z_Tv.gather(1, index_T1).squeeze(1).masked_fill_(~here_T, 0)
    # A row of -inf (all its logits are masked out on this rank) adds nothing.
    z_Tv.sub_(peak_T.masked_fill(peak_T == -torch.inf, 0).unsqueeze(1)).exp_()
    return torch.stack([peak_T, z_Tv.sum(1), target_T])


def _slab_gradient(
    x_Tv: Tensor,
    labels_T: Tensor,
    peak_T: Tensor,
    sum_T: Tensor,
    dloss: Tensor | None,
    terms: LossTerms,
) -> Tensor:
    z_Tv = _mapped(x_Tv, terms)
    slope_Tv = None
    if terms.softcap is not None:
        slope_Tv = (z_Tv / terms.softcap).square_().neg_().add_(1)
    index_T1, here_T = _targets(labels_T, z_Tv.shape[1], terms)
    z_Tv.sub_(peak_T.unsqueeze(1)).exp_().mul_(sum_T.reciprocal().unsqueeze(1))
    z_Tv.scatter_add_(1, index_T1, here_T.to(z_Tv.dtype).neg_().unsqueeze(1))
    if slope_Tv is not None:
        z_Tv.mul_(slope_Tv)
    if terms.scale != 1.0:
        z_Tv.mul_(terms.scale)
    if dloss is not None:
        z_Tv.mul_(dloss.to(z_Tv.dtype).reshape(-1, 1))
    # By mask, not by product: what an ignored row holds must not reach the gradient.
    return z_Tv.masked_fill_((labels_T == terms.ignore_index).unsqueeze(1), 0)
