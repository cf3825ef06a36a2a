"""Chunked, vocab-parallel cross entropy over the LM head: whole logits never exist.

For each chunk of tokens: its hidden states gathered from the sequence shards, logits of the local
vocabulary rows, their statistics (``hf_sp.kernels``) and one small all-gather of these, then the
gradient in the logits' place, its product with the head and the reduction of that to where the
hidden states live. Nothing of the size tokens x vocabulary, and no whole hidden states, outlive a
chunk. On a GPU the next chunk's gather runs beside this chunk's matrix products, and the reduction
of the input's gradient beside the weight's.

Gradients are made in the forward (three matrix products, none repeated) without the loss's scale:
``p - onehot`` is of order one, so that half precision neither under- nor overflows; the scale
``grad_output / denominator`` is applied once in backward.

Shape letters: B batch, S sequence, s = ceil(S / tp), T tokens of a chunk (of all ranks), H hidden,
V vocabulary, v local vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.errors import ConfigError, ShapeError
from hf_sp.kernels.cross_entropy import Group, axis_of, place
from hf_sp.kernels.cross_entropy_steps import (
    LossTerms,
    combine,
    share,
    token_statistics,
    write_gradient,
)
from hf_sp.kernels.vocab import check_ids
from hf_sp.model.local import cast_for_autocast, local


@dataclass(frozen=True, slots=True)
class LossSpec:
    """What the loss needs besides tensors.

    Args:
        terms: the loss of a token.
        axis: who holds the other rows of the vocabulary; None if there are no others.
        sharded: whether the hidden states are sequence shards (else they are replicated).
        chunk: tokens per chunk, over all ranks.
    """

    terms: LossTerms
    axis: Axis | None
    sharded: bool
    chunk: int


def linear_vocab_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    group: Group = None,
    *,
    bias: Tensor | None = None,
    sequence_parallel: bool = True,
    chunk: int = 4096,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: Literal["sum", "mean"] = "mean",
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    triton: bool = True,
) -> Tensor:
    """Cross entropy of ``hidden W^T + b``, whose logits are never whole, in any dimension.

    Shapes:   hidden [B, s, H], this rank's rows of the sequence, the last ones padded where tp does
              not divide S; [B, S, H], the same on all ranks, without ``sequence_parallel``;
              weight [v, H], this rank's rows of the vocabulary; labels [B, S], whole and as they
              count (not shifted) -> a scalar, equal bits on all ranks
    dtype:    logits in the dtype of hidden and weight; statistics, loss and the sum of the weight's
              gradient over the chunks in float32 (float64 for float64)
    Forward:  per chunk of T tokens 1 all-gather of hidden rows [T, H] (``sequence_parallel``), 1 of
              [3, T] statistics in float32, and 1 reduce-scatter (else
              all-reduce) of the gradient [T, H]; without grad mode no reduction
    Backward: no collective
    Saves:    the gradients: hidden's shape, [v, H], [v]
    Bytes:    alive at a time, for half precision: 2 v a token of the chunk (the logits, whose place
              the gradient takes), 6 H; a logit is read twice and written once after it was made
    Source:   Liu et al., Liger Kernel, arXiv:2410.10989, section 3.2 (gradients in the forward);
              Korthikanti et al., arXiv:2205.05198 (the sequence shards)

    Args:
        hidden: final hidden states.
        weight: rows of the head; a DTensor's local part is taken.
        labels: global ids.
        group: the tensor-parallel group, in any form ``vocab_parallel_cross_entropy`` takes.
        bias: [v].
        sequence_parallel: whether hidden is this rank's shard of the sequence.
        chunk: tokens per chunk, over all ranks.
        ignore_index: label of tokens that do not count.
        softcap: bound of the logits.
        scale: factor of the logits, applied before the cap.
        reduction: the mean is over the tokens that count: NaN, with gradients of zero, if none.
        vocab_size: rows of all ranks, split as ``torch.chunk`` does; gathered if not given.
        vocab_start: first row of this rank, for another split.
        triton: False: torch operations only.

    Raises:
        ShapeError: shapes that do not fit, or a label outside the vocabulary.
        ConfigError: an argument out of its range.
    """
    axis = axis_of(group)
    sharded = sequence_parallel and axis is not None
    if reduction not in ("sum", "mean") or chunk < 1:
        raise ConfigError(
            "an argument of the chunked loss is out of its range",
            got=f"reduction={reduction!r}, chunk={chunk}",
            legal="'sum' or 'mean', and at least 1 token",
        )
    weight, bias = local(weight), None if bias is None else local(bias)
    _check_shapes(hidden, weight, labels, axis if sharded else None)
    vocab, start = place(weight.shape[0], weight.device, axis, vocab_size, vocab_start)
    check_ids(labels, vocab, "labels", ignore_index)
    terms = LossTerms(
        vocab=vocab,
        start=start,
        ignore_index=ignore_index,
        softcap=softcap,
        scale=scale,
        triton=triton,
    )
    hidden = cast_for_autocast(hidden, hidden)
    weight = cast_for_autocast(weight, hidden)
    bias = None if bias is None else cast_for_autocast(bias, hidden)
    spec = LossSpec(terms, axis, sharded, chunk)
    full = None if sharded else hidden
    total = linear_cross_entropy(hidden, full, weight, bias, labels.to(hidden.device), spec)
    return total if reduction == "sum" else scaled_loss(total, labels.ne(ignore_index).sum())


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, axis: Axis | None) -> None:
    fits = hidden.dim() == 3 and weight.dim() == 2 and labels.dim() == 2
    if fits:
        rows = labels.shape[1]
        rows = rows if axis is None else comm.padded(rows, axis.size) // axis.size
        fits = hidden.shape == (labels.shape[0], rows, weight.shape[1])
    if not fits:
        raise ShapeError(
            "hidden states, head and labels do not fit together",
            where="linear_vocab_parallel_cross_entropy",
            got=f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels "
            f"{tuple(labels.shape)}",
            rule="hidden [B, s, H], weight [v, H], labels [B, S], where s = "
            + ("S" if axis is None else f"ceil(S / {axis.size})"),
        )


def linear_cross_entropy(
    source: Tensor,
    full_BSH: Tensor | None,
    weight_vH: Tensor,
    bias_v: Tensor | None,
    labels_BS: Tensor,
    spec: LossSpec,
) -> Tensor:
    """Summed cross entropy of ``full W^T + b`` against labels that are shifted already.

    As ``linear_vocab_parallel_cross_entropy``, without its checks. ``full`` is the gathered value
    of a shard where somebody has made it anyway: it saves the gathers. For hidden states that are
    not sharded, it is the source.
    """
    full_BSH = None if full_BSH is None else full_BSH.detach()
    return _LinearCrossEntropy.apply(source, full_BSH, weight_vH, bias_v, labels_BS, spec)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        full_BSH: Tensor | None,
        weight_vH: Tensor,
        bias_v: Tensor | None,
        labels_BS: Tensor,
        spec: LossSpec,
    ) -> Tensor:
        wide = torch.promote_types(source.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=source.device)
        needs_source, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        dsource = torch.empty_like(source) if needs_source else None
        dweight = dbias = None
        pieces = _pieces(source, spec)
        for x_TH, labels_T, rows in _chunks(source, full_BSH, labels_BS, pieces, spec):
            logits_Tv = torch.nn.functional.linear(x_TH, weight_vH, bias_v)
            stats = share(token_statistics(logits_Tv, labels_T, spec.terms), spec.axis)
            whole = combine(stats, labels_T, spec.terms)
            total += whole.loss.sum()
            if not (needs_source or needs_weight or needs_bias):
                del logits_Tv
                continue
            # Nobody else has these logits: the gradient takes their place.
            grad_Tv = write_gradient(logits_Tv, labels_T, whole, spec.terms)
            dx_TH = _launch(grad_Tv @ weight_vH, spec) if dsource is not None else None
            if needs_weight:
                dweight = _plus(dweight, grad_Tv.t() @ x_TH, wide, len(pieces))
            if needs_bias:
                dbias = _plus(dbias, grad_Tv.sum(0, dtype=wide), wide, len(pieces))
            if dsource is not None and dx_TH is not None:
                _store(dsource, dx_TH, rows, spec)
            # Or the next chunk's logits would be made beside these.
            del logits_Tv, grad_Tv, x_TH, dx_TH
        if needs_weight and dweight is None:
            dweight = torch.zeros_like(weight_vH)
        if needs_bias and dbias is None:
            dbias = weight_vH.new_zeros(weight_vH.shape[0])
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


def _plus(total: Tensor | None, part: Tensor, wide: torch.dtype, parts: int) -> Tensor:
    """Sum of the chunks' gradients, wide where there are several."""
    if total is None:
        return part if parts == 1 else part.to(wide)
    return total.add_(part)


def scaled_loss(total: Tensor, items: Tensor | float) -> Tensor:
    """``total / items``, and a gradient of zero where ``items`` is zero.

    torch's cross entropy writes no gradient for ignored tokens, so that a batch without a counted
    label trains nothing; dividing by its count would make every gradient nan.
    """
    if not isinstance(items, Tensor):
        items = total.new_tensor(float(items))
    counted = items != 0
    return (total / items.masked_fill(~counted, 1)).where(counted, total.detach() / items)


def _pieces(source: Tensor, spec: LossSpec) -> list[tuple[int, int]]:
    """Rows of the source, ``[a, b)``, of each chunk.

    Sharded: the same rows of every rank's shard, so that a chunk's gradient reduce-scatters to the
    rows that its hidden states were gathered from.
    """
    B, s = source.shape[:2]
    ranks = spec.axis.size if spec.sharded and spec.axis is not None else 1
    rows = max(1, spec.chunk // max(1, B * ranks))
    return [(a, min(a + rows, s)) for a in range(0, s, rows)]


def _chunks(
    source: Tensor,
    full_BSH: Tensor | None,
    labels_BS: Tensor,
    pieces: list[tuple[int, int]],
    spec: LossSpec,
) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
    """Each chunk's hidden states ``[T, H]`` and labels ``[T]``, by rank, then row, then batch.

    The padding at the end of the sequence gets the label to ignore.
    """
    B, s, H = source.shape
    ranks = spec.axis.size if spec.sharded and spec.axis is not None else 1
    missing = ranks * s - labels_BS.shape[1]
    ignore = spec.terms.ignore_index
    labels = torch.nn.functional.pad(labels_BS, (0, missing), value=ignore)
    labels_RsB = labels.t().reshape(ranks, s, B)
    full_RsBH = None
    if full_BSH is not None:
        full_SBH = full_BSH.transpose(0, 1)
        if missing:
            full_SBH = torch.cat([full_SBH, full_SBH.new_zeros(missing, B, H)])
        full_RsBH = full_SBH.reshape(ranks, s, B, H)

    def launch(a: int, b: int) -> Tensor:
        assert spec.axis is not None
        return comm.launch_all_gather(source[:, a:b].transpose(0, 1), spec.axis)

    ahead = launch(*pieces[0]) if full_RsBH is None and pieces else None
    for index, (a, b) in enumerate(pieces):
        if full_RsBH is not None:
            x = full_RsBH[:, a:b]
        else:
            assert ahead is not None
            x = comm.wait(ahead)
            # The next chunk is on its way while this one is computed with.
            ahead = launch(*pieces[index + 1]) if index + 1 < len(pieces) else None
        yield x.reshape(-1, H), labels_RsB[:, a:b].reshape(-1), (a, b)


def _launch(dx_TH: Tensor, spec: LossSpec) -> Tensor:
    """Start the reduction of a chunk's partial input gradient."""
    if spec.axis is None:
        return dx_TH
    reduce = comm.launch_reduce_scatter if spec.sharded else comm.launch_all_reduce
    return reduce(dx_TH, spec.axis)


def _store(dsource: Tensor, dx: Tensor, rows: tuple[int, int], spec: LossSpec) -> None:
    """Put a chunk's reduced gradient into its rows of the source's gradient."""
    a, b = rows
    B, H = dsource.shape[0], dsource.shape[2]
    dx = dx if spec.axis is None else comm.wait(dx)
    dsource[:, a:b] = dx.view(b - a, B, H).transpose(0, 1)
