"""Mutants of the dense blocks: entry, exit, what is made again, biases and heads."""

from __future__ import annotations

import torch
from behaviour.inputs import touched_all
from harness.parity import Case

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.model import block, columns, embedding, linear, mlp, norm, ports
from mutants import wrongly
from mutants.registry import Patch, mutant

# --- entry and exit of the stack ----------------------------------------------------------------


@mutant()
def stack_entry_backward_keeps_own_shard() -> list[Patch]:
    def backward(ctx, grad):
        x = wrongly.own_copies(grad.transpose(0, 1).contiguous(), ctx.axis)
        return x[: ctx.length].transpose(0, 1), None

    return [wrongly.backward(pairs._ScatterAllGather, backward)]


@mutant(check=touched_all)
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
    return [(columns, "_gather_again", lambda x, axis, grads: wrongly.rolled(x, axis))]


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
    right = columns._input_gradient

    def wrong(ctx, dfull, dys, weights):
        last = max(i for i, dy in enumerate(dys) if dy is not None)
        return right(ctx, dfull, [dy if i == last else None for i, dy in enumerate(dys)], weights)

    return [(columns, "_input_gradient", wrong)]


@mutant()
def port_gets_no_gradient() -> list[Patch]:
    right = ports._Column.backward
    lost = lambda ctx, grad: tuple(g if g is None else g * 0 for g in right(ctx, grad))  # noqa: E731
    return [wrongly.backward(ports._Column, lost)]


@mutant()
def key_s_gradient_goes_to_the_value_s_port() -> list[Patch]:
    right = columns.gather_columns

    def wrong(x, linears, *rest, **kwargs):
        gathered = right(x, linears, *rest, **kwargs)
        if gathered.batch_major and gathered.ports:
            _, key, value = (gathered.ports[one] for one, _ in linears)
            gathered.ports[linears[1][0]] = key._replace(outputs=value.outputs)
            gathered.ports[linears[2][0]] = value._replace(outputs=key.outputs)
        return gathered

    return [(block, "gather_columns", wrong)]


@mutant()
def port_s_gradient_is_of_other_tokens() -> list[Patch]:
    right = columns._tokens
    return [(columns, "_tokens", lambda x, spec: right(x.roll(1, 1), spec))]


@mutant(Case("llama_bias", sp=False))
def tp_entry_backward_does_not_reduce() -> list[Patch]:
    keep = comm.launch_all_reduce
    return [
        (comm, "launch_all_reduce", lambda x, axis: x.clone()),
        (comm, "all_reduce", lambda x, axis: comm.wait(keep(x, axis))),
    ]


# --- exit of a TP block -------------------------------------------------------------------------


# A length that tp divides (the second micro-batch's); else the exit is handed padding rows.
EVEN = Case("llama_bias", accum=2)


def _exit_not_reduced(x_SBH, axis):
    return wrongly.own_part(comm.pad_sequence(x_SBH, axis), axis).transpose(0, 1)


@mutant(EVEN)
def block_exit_does_not_reduce() -> list[Patch]:
    def forward(ctx, x, axis):
        ctx.axis, ctx.length = axis, x.shape[1]
        return _exit_not_reduced(x.transpose(0, 1), axis)

    return [(pairs._ReduceScatterAllGather, "forward", staticmethod(forward))]


@mutant()
def padded_block_exit_does_not_reduce() -> list[Patch]:
    def forward(ctx, x, axis):
        ctx.axis = axis
        return _exit_not_reduced(x, axis)

    return [(pairs._PaddedReduceScatterAllGather, "forward", staticmethod(forward))]


@mutant(EVEN)
def block_exit_averages() -> list[Patch]:
    return [(pairs, "reducescatter_allgather", wrongly.averaged(pairs.reducescatter_allgather))]


@mutant()
def padded_block_exit_averages() -> list[Patch]:
    right = pairs.padded_reducescatter_allgather
    return [(pairs, "padded_reducescatter_allgather", wrongly.averaged(right))]


@mutant(EVEN)
def block_exit_backward_keeps_own_shard() -> list[Patch]:
    def backward(ctx, grad):
        x = wrongly.own_copies(grad.transpose(0, 1).contiguous(), ctx.axis)
        return x[: ctx.length].transpose(0, 1), None

    return [wrongly.backward(pairs._ReduceScatterAllGather, backward)]


@mutant()
def padded_block_exit_backward_keeps_own_shard() -> list[Patch]:
    def backward(ctx, grad):
        return wrongly.own_copies(grad.transpose(0, 1).contiguous(), ctx.axis), None

    return [wrongly.backward(pairs._PaddedReduceScatterAllGather, backward)]


@mutant()
def padding_rows_come_first() -> list[Patch]:
    right = pairs.padded_reducescatter_allgather
    return [(pairs, "padded_reducescatter_allgather", lambda x, axis: right(x.roll(1, 0), axis))]


def _padding_rows(value: float) -> list[Patch]:
    right = linear.row_output

    def wrong(ctx, x, *rest):
        y, weight = right(ctx, x, *rest)
        if ctx.height:
            y[x.shape[1] :] = value
        return y, weight

    return [(module, "row_output", wrong) for module in (linear, mlp)]


@mutant()
def padding_rows_are_not_zeroed() -> list[Patch]:
    """Any number there is without effect: its gradient is zero. What memory holds may be none."""
    return _padding_rows(torch.inf)


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
    right = norm._norm_again

    def wrong(x, weight, **kwargs):
        return right(x, torch.ones_like(weight), **kwargs)

    return [(norm, "_norm_again", wrong)]


@mutant()
def norm_made_again_from_the_wrong_shard() -> list[Patch]:
    right = norm._norm_again
    return [
        (norm, "_norm_again", lambda x, weight, **kwargs: right(x.roll(1, 1), weight, **kwargs))
    ]


@mutant()
def product_made_again_from_gate_alone() -> list[Patch]:
    right = mlp.swiglu_backward

    def wrong(dz, gate, up, **kwargs):
        dgate, dup, product = right(dz, gate, up, **kwargs)
        return dgate, dup, product / up

    return [(mlp, "swiglu_backward", wrong)]


@mutant()
def gated_gradient_without_its_slope() -> list[Patch]:
    """d silu(g) taken for sigmoid(g): the second term of the derivative is missing."""
    right = mlp.swiglu_backward

    def wrong(dz, gate, up, **kwargs):
        _, dup, product = right(dz, gate, up, **kwargs)
        return dz * up * gate.sigmoid(), dup, product

    return [(mlp, "swiglu_backward", wrong)]


@mutant()
def gated_row_bias_added_on_every_rank() -> list[Patch]:
    right = mlp.SwiGLURowLinear.forward

    def forward(ctx, triton, gate, up, product, weight, bias, add_bias, *rest):
        return right(ctx, triton, gate, up, product, weight, bias, True, *rest)

    return [(mlp.SwiGLURowLinear, "forward", staticmethod(forward))]


# --- row bias, padding row, replicated heads ----------------------------------------------------


@mutant()
def row_bias_added_on_every_rank() -> list[Patch]:
    right = linear.RowLinear.forward

    def forward(ctx, x, weight, bias, add_bias, *rest):
        return right(ctx, x, weight, bias, True, *rest)

    return [(linear.RowLinear, "forward", staticmethod(forward))]


@mutant()
def row_bias_gradient_summed_again() -> list[Patch]:
    right = linear.RowLinear.backward

    def backward(ctx, grad):
        dx, dw, db, *rest = right(ctx, grad)
        return dx, dw, db * 2, *rest

    return [wrongly.backward(linear.RowLinear, backward)]


@mutant(Case("llama_odd_vocab"))
def padding_row_gets_a_gradient() -> list[Patch]:
    right = embedding.F.embedding
    return [(embedding.F, "embedding", lambda ids, weight, padding: right(ids, weight))]


@mutant(Case("llama_kv2"), tp=4)
def replicated_head_is_the_wrong_one() -> list[Patch]:
    right = linear.ColumnParallelLinear.convert_.__func__

    def wrong(cls, module, *rest, **how):
        right(cls, module, *rest, **how)
        if module.rows is not None:
            ((first, width),) = module.rows
            module.rows = ((width - first, width),)

    return [(linear.ColumnParallelLinear, "convert_", classmethod(wrong))]


@mutant(Case("llama"))
def mask_of_another_length() -> list[Patch]:
    """The block's input is rolled by one position, and so shifted against mask and positions."""
    right = comm.gather_sequence
    return [(comm, "gather_sequence", lambda x, n, axis: right(x, n, axis).roll(1, 1))]
