"""Mutants of the dense blocks: entry, exit, what is made again, biases and heads."""

from __future__ import annotations

from unittest import mock

import torch
from harness.parity import Case

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.model import columns as entry
from hf_sp.model import embedding
from hf_sp.model import mlp as gated
from hf_sp.model import norm as fused
from hf_sp.model import shard as swap
from mutants import wrongly
from mutants.registry import Patch, mutant

# --- entry and exit of the stack ----------------------------------------------------------------


@mutant()
def stack_entry_backward_keeps_own_shard() -> list[Patch]:
    def backward(ctx, grad):
        x = wrongly.own_copies(grad.transpose(0, 1).contiguous(), ctx.axis)
        return x[: ctx.length].transpose(0, 1), None

    return [wrongly.backward(pairs._ScatterAllGather, backward)]


@mutant()
def stack_entry_takes_the_wrong_shard() -> list[Patch]:
    right = comm.own_shard

    def wrong(x, axis):
        return right(x, comm.Axis(axis.group, axis.size, (axis.rank + 1) % axis.size))

    return [(comm, "own_shard", wrong)]


# With kept logits the final hidden states are gathered whole, and the loss computes on them.
@mutant(Case("llama", parallelize=(("keep_logits", True),)))
def final_gather_in_wrong_rank_order() -> list[Patch]:
    def forward(ctx, x, length, axis):
        ctx.axis = axis
        return wrongly.rolled(x.transpose(0, 1), axis)[:length].transpose(0, 1)

    return [(pairs._AllGatherScatter, "forward", staticmethod(forward))]


# --- entry of a TP block ------------------------------------------------------------------------


@mutant()
def block_entry_gathers_own_copies() -> list[Patch]:
    def wrong(x, length, axis):
        return wrongly.own_copies(x.transpose(0, 1).contiguous(), axis)[:length].transpose(0, 1)

    return [(comm, "gather_sequence", wrong)]


@mutant()
def block_entry_regathers_in_wrong_rank_order() -> list[Patch]:
    right = entry._weight_gradients

    def wrong(*args):
        with mock.patch.object(comm, "all_gather", wrongly.rolled):
            return right(*args)

    return [(entry, "_weight_gradients", wrong)]


@mutant()
def block_entry_backward_does_not_reduce() -> list[Patch]:
    keep = comm.launch_reduce_scatter
    # The forward's own reduce-scatter stays right: only dx is wrong.
    return [
        (comm, "launch_reduce_scatter", wrongly.own_part),
        (comm, "reduce_scatter", lambda x, axis: comm.wait(keep(x, axis))),
    ]


@mutant()
def block_entry_backward_averages() -> list[Patch]:
    right = comm.launch_reduce_scatter
    # The forward's own reduce-scatter is averaged too; undone there, so that only dx is wrong.
    return [
        (comm, "launch_reduce_scatter", wrongly.averaged(right)),
        (comm, "reduce_scatter", lambda x, axis: comm.wait(right(x, axis))),
    ]


@mutant()
def block_keeps_only_the_last_input_gradient() -> list[Patch]:
    right = entry.Entry.receive

    def wrong(self, slot, dy, weight, keep):
        self.dx = None
        right(self, slot, dy, weight, keep)

    return [(entry.Entry, "receive", wrong)]


@mutant(Case("llama_bias", sp=False))
def tp_entry_backward_does_not_reduce() -> list[Patch]:
    keep = comm.launch_all_reduce
    return [
        (comm, "launch_all_reduce", lambda x, axis: x.clone()),
        (comm, "all_reduce", lambda x, axis: comm.wait(keep(x, axis))),
    ]


# --- exit of a TP block -------------------------------------------------------------------------


@mutant()
def block_exit_does_not_reduce() -> list[Patch]:
    def forward(ctx, x, axis):
        ctx.axis, ctx.length = axis, x.shape[1]
        padded = comm.pad_sequence(x.transpose(0, 1), axis)
        return wrongly.own_part(padded, axis).transpose(0, 1)

    return [(pairs._ReduceScatterAllGather, "forward", staticmethod(forward))]


@mutant()
def block_exit_averages() -> list[Patch]:
    return [(pairs, "reducescatter_allgather", wrongly.averaged(pairs.reducescatter_allgather))]


@mutant()
def block_exit_backward_keeps_own_shard() -> list[Patch]:
    def backward(ctx, grad):
        x = wrongly.own_copies(grad.transpose(0, 1).contiguous(), ctx.axis)
        return x[: ctx.length].transpose(0, 1), None

    return [wrongly.backward(pairs._ReduceScatterAllGather, backward)]


@mutant(Case("llama", sp=False))
def tp_exit_backward_reduces_again() -> list[Patch]:
    def backward(ctx, grad):
        return comm.all_reduce(grad, ctx.axis), None

    def forward(ctx, x, axis):
        ctx.axis = axis
        return comm.all_reduce(x, axis)

    cls = pairs._AllReduceIdentity
    return [wrongly.backward(cls, backward), (cls, "forward", staticmethod(forward))]


# --- what is made again in backward -------------------------------------------------------------


@mutant()
def norm_made_again_without_its_weight() -> list[Patch]:
    right = fused._norm_again

    def wrong(x, weight, **kwargs):
        return right(x, torch.ones_like(weight), **kwargs)

    return [(fused, "_norm_again", wrong)]


@mutant()
def norm_made_again_from_the_wrong_shard() -> list[Patch]:
    right = fused._norm_again
    return [
        (fused, "_norm_again", lambda x, weight, **kwargs: right(x.roll(1, 1), weight, **kwargs))
    ]


@mutant()
def product_made_again_from_gate_alone() -> list[Patch]:
    right = gated.swiglu_backward

    def wrong(dz, gate, up, **kwargs):
        dgate, dup, product = right(dz, gate, up, **kwargs)
        return dgate, dup, product / up

    return [(gated, "swiglu_backward", wrong)]


@mutant()
def gated_gradient_without_its_slope() -> list[Patch]:
    """d silu(g) taken for sigmoid(g): the second term of the derivative is missing."""
    right = gated.swiglu_backward

    def wrong(dz, gate, up, **kwargs):
        _, dup, product = right(dz, gate, up, **kwargs)
        return dz * up * gate.sigmoid(), dup, product

    return [(gated, "swiglu_backward", wrong)]


@mutant()
def gated_row_bias_added_on_every_rank() -> list[Patch]:
    right = gated.GatedRowLinear.forward

    def forward(ctx, gate, up, product, weight, bias, add_bias, *rest):
        return right(ctx, gate, up, product, weight, bias, True, *rest)

    return [(gated.GatedRowLinear, "forward", staticmethod(forward))]


# --- row bias, padding row, replicated heads ----------------------------------------------------


@mutant()
def row_bias_added_on_every_rank() -> list[Patch]:
    right = gated.RowLinear.forward

    def forward(ctx, x, weight, bias, add_bias, sharded):
        return right(ctx, x, weight, bias, True, sharded)

    return [(gated.RowLinear, "forward", staticmethod(forward))]


@mutant()
def row_bias_gradient_summed_again() -> list[Patch]:
    right = gated.RowLinear.backward

    def backward(ctx, grad):
        dx, dw, db, *rest = right(ctx, grad)
        return dx, dw, db * 2, *rest

    return [wrongly.backward(gated.RowLinear, backward)]


@mutant(Case("llama_odd_vocab"))
def padding_row_gets_a_gradient() -> list[Patch]:
    right = embedding.F.embedding
    return [(embedding.F, "embedding", lambda ids, weight, padding: right(ids, weight))]


@mutant(Case("llama_kv2"), tp=4)
def replicated_head_is_the_wrong_one() -> list[Patch]:
    right = swap._swap_linear

    def wrong(module, leaf, *rest):
        right(module, leaf, *rest)
        if module.rows is not None:
            first, width = module.rows
            module.rows = (width - first, width)

    return [(swap, "_swap_linear", wrong)]


@mutant(Case("llama"))
def mask_of_another_length() -> list[Patch]:
    """The block's input is rolled by one position, and so shifted against mask and positions."""
    right = comm.gather_sequence
    return [(comm, "gather_sequence", lambda x, n, axis: right(x, n, axis).roll(1, 1))]
