"""Mutants of the adapters: one for every sum, scale and mask."""

from __future__ import annotations

import functools

import torch
from adapters.jobs import Lora, train_all
from harness.parity import Case

from hf_sp.adapters import lora_linear as layers
from hf_sp.adapters import lora_vocab as vocab
from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.model import low_rank, ports
from hf_sp.model.dropout import Dropout
from mutants import registry
from mutants.registry import Patch

PLAIN = Lora(Case("llama"), "after")
DORA = Lora(Case("llama_bias", seed=1), "after", (("use_dora", True),))
DROPOUT = Lora(Case("llama"), "after", (("lora_dropout", 0.3),))
VOCABULARY = Lora(
    Case("llama_odd_vocab"), "after", (("target_modules", ("embed_tokens", "lm_head")),)
)
SHARED = Lora(Case("llama_kv1"), "after")


mutant = functools.partial(registry.mutant, check=train_all)


def _averaged(x: torch.Tensor, axis: comm.Axis) -> torch.Tensor:
    y = pairs._IdentityAllReduce.apply(x, axis)
    return y.detach() + (y - y.detach()) / axis.size


@mutant(PLAIN)
def sum_of_column_factors_dropped() -> list[Patch]:
    return [(low_rank, "_sum_together", lambda grads, axis: None)]


@mutant(PLAIN)
def sum_of_column_factors_averaged() -> list[Patch]:
    right = low_rank._sum_together

    def wrong(grads, axis):
        right(grads, axis)
        grads[:] = [None if g is None else g / axis.size for g in grads]

    return [(low_rank, "_sum_together", wrong)]


@mutant(PLAIN)
def sum_of_column_factors_in_another_order() -> list[Patch]:
    right = low_rank._sum_together

    def wrong(grads, axis):
        right(grads, axis)
        grads.reverse()

    return [(low_rank, "_sum_together", wrong)]


@mutant(PLAIN)
def factor_gradients_not_reduced() -> list[Patch]:
    right = low_rank.split_gradients

    def wrong(reduced, waiting, x, needs, wants_dx, axis, sharded):
        reduced = reduced.clone()
        start = reduced.shape[-1] - sum(one.du.shape[-1] for one in waiting)
        for one in waiting:
            stop = start + one.du.shape[-1]
            height = reduced.shape[0]
            own = one.du[axis.rank * height : (axis.rank + 1) * height]
            reduced[: own.shape[0], :, start:stop] = own
            start = stop
        return right(reduced, waiting, x, needs, wants_dx, axis, sharded)

    return [(low_rank, "split_gradients", wrong)]


@mutant(PLAIN)
def input_gradient_without_the_factors() -> list[Patch]:
    right = low_rank.split_gradients

    def wrong(reduced, waiting, *rest):
        dx, grads = right(reduced, waiting, *rest)
        width = sum(one.du.shape[-1] for one in waiting)
        return reduced[..., : reduced.shape[-1] - width] if dx is not None else None, grads

    return [(low_rank, "split_gradients", wrong)]


@mutant(Lora(Case("llama", sp=False), "after"))
def plain_tp_sums_whole_gradients() -> list[Patch]:
    right = low_rank.split_gradients

    def wrong(*args):
        dx, grads = right(*args)
        low_rank._sum_together(grads, args[5])
        return dx, grads

    return [(low_rank, "split_gradients", wrong)]


@mutant(PLAIN)
def sum_of_row_factor_dropped() -> list[Patch]:
    return [(layers.ParallelLora, "_summed", lambda self, p: p)]


@mutant(PLAIN)
def sum_of_row_factor_averaged() -> list[Patch]:
    return [
        (layers.ParallelLora, "_summed", lambda self, p: _averaged(p, self.axis)),
    ]


@mutant(PLAIN)
def row_adapter_scaled_as_if_it_were_whole() -> list[Patch]:
    right = layers.RowLoraLinear._delta
    return [(layers.RowLoraLinear, "_delta", lambda self, *a: right(self, *a) / self.axis.size)]


@mutant(SHARED)
def sum_over_ranks_that_share_a_head_dropped() -> list[Patch]:
    return [(layers.ColumnLoraLinear, "_summed", lambda self, p: p)]


@mutant(DORA)
def dora_norm_of_the_shard() -> list[Patch]:
    return [(layers.RowLoraLinear, "_row_norm", layers.ParallelLora._row_norm)]


@mutant(DORA)
def dora_bias_on_every_rank() -> list[Patch]:
    return [(layers.RowLoraLinear, "_bias", layers.ParallelLora._bias)]


@mutant(DORA)
def dora_magnitude_not_summed() -> list[Patch]:
    return [(layers.RowLoraLinear, "_summed", lambda self, p: p)]


@mutant(DROPOUT)
def dropout_alike_on_other_features() -> list[Patch]:
    right = Dropout.part
    return [(Dropout, "part", lambda self, x, index: right(self, x, 0))]


@mutant(DROPOUT)
def dropout_of_another_shard_in_backward() -> list[Patch]:
    right = low_rank.split_gradients

    def wrong(*args):
        axis = args[5]
        other = comm.Axis(axis.group, axis.size, (axis.rank + 1) % axis.size)
        return right(*args[:5], other, *args[6:])

    return [(low_rank, "split_gradients", wrong)]


@mutant(DROPOUT)
def dropout_not_undone_in_backward() -> list[Patch]:
    right = low_rank._LowRank.backward

    def backward(ctx, *grads):
        ctx.dropout = None
        return right(ctx, *grads)

    return [(low_rank._LowRank, "backward", staticmethod(backward))]


@mutant(DROPOUT)
def kept_values_are_not_scaled() -> list[Patch]:
    """Everywhere: forward and backward agree, and the factors are another model's."""
    return [(Dropout, "scale", 1.0)]


@mutant(DROPOUT)
def row_factor_is_not_scaled_for_its_dropout() -> list[Patch]:
    return [(low_rank, "_scaled", lambda x, dropout: x)]


@mutant(DROPOUT)
def column_factor_is_not_scaled_for_its_dropout() -> list[Patch]:
    right = ports._LowRankColumn.forward

    def forward(ctx, x, port, A, *rest):
        # A comes scaled; here as it is.
        return right(ctx, x, port, A * (1 - 0.3), *rest)

    return [(ports._LowRankColumn, "forward", staticmethod(forward))]


@mutant(DROPOUT)
def column_factors_drop_as_one_rank_would() -> list[Patch]:
    right = Dropout.parts
    return [(Dropout, "parts", lambda self, x, count: right(self, x, 1))]


@mutant(PLAIN)
def column_factor_s_port_gets_no_gradient() -> list[Patch]:
    right = ports._LowRankColumn.backward

    def lost(ctx, grad):
        return tuple(g if g is None else g * 0 for g in right(ctx, grad))

    return [(ports._LowRankColumn, "backward", staticmethod(lost))]


@mutant(VOCABULARY)
def head_adapter_keeps_own_rows_gradient() -> list[Patch]:
    return [(pairs, "identity_allreduce", lambda x, axis: x)]


@mutant(VOCABULARY)
def embedding_adapter_looks_up_ids_of_other_ranks() -> list[Patch]:
    return [(vocab, "vocab_range", lambda vocab, axis: (0, -(-vocab // axis.size)))]
