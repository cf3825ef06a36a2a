"""Cross entropy over logits whose vocabulary is split over the ranks of a group.

Owns the public function, its arguments and its autograd; ``cross_entropy_steps`` computes. Must not
know modules, sequence shards.

Shape letters: T tokens, V vocabulary, v local vocabulary columns.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.errors import ConfigError, ShapeError
from hf_sp.kernels.cross_entropy_steps import (
    Combined,
    LossTerms,
    combine,
    share,
    token_statistics,
    write_gradient,
)
from hf_sp.kernels.vocab import check_ids, vocab_range
from hf_sp.torch_private import process_group

Group = Axis | DeviceMesh | dist.ProcessGroup | str | None
Reduction = Literal["none", "sum", "mean"]


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    group: Group = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    scale: float = 1.0,
    reduction: Reduction = "none",
    vocab_size: int | None = None,
    vocab_start: int | None = None,
    triton: bool = True,
) -> Tensor:
    """Cross entropy of logits that hold this rank's columns of the vocabulary.

    ``torch.nn.functional.cross_entropy`` over the whole vocabulary, with the two things that models
    do to their logits: ``scale * x`` first, then ``softcap * tanh(x / softcap)``.

    Shapes:   logits [..., v] of any strides; labels [...], global ids -> loss [...] or a scalar,
              equal bits on all ranks
    dtype:    float16, bfloat16, float32: statistics and loss in float32, the gradient rounded once;
              float64: all in float64
    Forward:  1 all-gather of [3, T] statistics over the group; without vocab_size or vocab_start 1
              more, of one number, and a synchronisation
    Backward: no collective
    Saves:    the logits themselves, labels, two numbers a token
    Bytes:    a half-precision logit is read once forward (2), read and written once backward
              (2 + 2), into memory of its own
    Source:   the three statistics are Megatron-LM's (arXiv:1909.08053, section 3); one online pass
              over them is Milakov and Gimelshein's, arXiv:1805.02867

    Args:
        logits: this rank's columns. A rank may have none.
        labels: global ids, the same on all ranks.
        group: who holds the other columns: a process group or its name, a 1-D mesh, an ``Axis``;
            None if the logits are whole.
        ignore_index: label of tokens that do not count: loss 0, gradient 0.
        softcap: bound of the logits.
        scale: factor of the logits.
        reduction: ``"mean"`` is over the tokens that count, NaN if none does.
        vocab_size: columns of all ranks, split as ``torch.chunk`` does.
        vocab_start: first column of this rank, for another split.
        triton: False: torch operations only.

    Raises:
        ShapeError: shapes that do not fit, or (on CPU; a device assert elsewhere) a label outside
            the vocabulary.
        ConfigError: an argument out of its range.
    """
    axis = _axis_of(group)
    _check(logits, labels, reduction)
    vocab, start = _place(logits, axis, vocab_size, vocab_start)
    check_ids(labels, vocab, "labels", ignore_index)
    terms = LossTerms(vocab, start, ignore_index, softcap, scale, triton)
    loss = _CrossEntropy.apply(logits, labels.to(logits.device), axis, terms)
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / labels.ne(ignore_index).sum()


class _CrossEntropy(Node):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, axis: Axis | None, terms: LossTerms
    ) -> Tensor:
        labels_T = labels.reshape(-1).contiguous()
        logits_Tv = logits.reshape(labels_T.shape[0], logits.shape[-1])
        mine = token_statistics(logits_Tv, labels_T, terms)
        loss, peak_T, sum_T = combine(share(mine, axis), labels_T, terms)
        ctx.save_for_backward(logits, labels_T, peak_T, sum_T)
        ctx.terms = terms
        return loss.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, labels_T, peak_T, sum_T = ctx.saved_tensors
        logits_Tv = logits.detach().reshape(labels_T.shape[0], logits.shape[-1])
        out_Tv, whole = torch.empty_like(logits_Tv), Combined(peak_T, peak_T, sum_T)
        dloss_T = grads[0].reshape(-1)
        write_gradient(logits_Tv, labels_T, whole, ctx.terms, dloss=dloss_T, out=out_Tv)
        return out_Tv.view(logits.shape), None, None, None


def _axis_of(group: Group) -> Axis | None:
    if group is None or isinstance(group, Axis):
        return group
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ConfigError(
                "the vocabulary is split over one axis of a mesh",
                got=f"a mesh of axes {group.mesh_dim_names or group.ndim}",
                legal='a 1-D mesh, such as mesh["tp"]',
            )
        return Axis.of(group)
    found = process_group(group) if isinstance(group, str) else group
    return Axis(found.group_name, found.size(), found.rank())


def _check(logits: Tensor, labels: Tensor, reduction: str) -> None:
    where = "vocab_parallel_cross_entropy"
    if logits.dim() == 0 or not logits.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ShapeError(
            "these labels do not belong to these logits",
            where=where,
            got=f"logits {tuple(logits.shape)} {logits.dtype}, labels {tuple(labels.shape)}",
            rule="logits [..., v], one label for each row [...]",
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ShapeError("labels are ids", where=where, got=str(labels.dtype), legal="torch.int64")
    if reduction not in get_args(Reduction):
        raise ConfigError(
            "unknown reduction", where=where, got=repr(reduction), legal="'none', 'sum', 'mean'"
        )


def _place(
    logits: Tensor, axis: Axis | None, vocab_size: int | None, vocab_start: int | None
) -> tuple[int, int]:
    """Size of the whole vocabulary, and this rank's first column."""
    columns, start = logits.shape[-1], vocab_start
    if vocab_size is None and axis is not None:
        sizes = comm.all_gather(torch.tensor([columns], device=logits.device), axis).tolist()
        vocab_size = sum(sizes)
        start = sum(sizes[: axis.rank]) if start is None else start
    elif vocab_size is None:
        vocab_size = columns + (start or 0)
    stop = None
    if start is None:
        start, stop = (0, vocab_size) if axis is None else vocab_range(vocab_size, axis)
    if start < 0 or start + columns > vocab_size or (stop is not None and start + columns != stop):
        raise ShapeError(
            "the local vocabulary is not this rank's part of the whole",
            got=f"{columns} columns from {start}, vocab_size={vocab_size}",
            rule="without vocab_start, rank r has the columns from r * ceil(V / tp) on",
            remedy="pass vocab_start for another split",
        )
    return vocab_size, start
