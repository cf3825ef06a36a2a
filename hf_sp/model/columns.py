"""The entry of a TP block: one autograd node that gathers the input and makes all its gradients.

How a block saves only its shard (Korthikanti et al. 2022, section 4.2.2, for separate q/k/v). For
each reader with a weight (a column linear, a low-rank factor, a router, experts) the node returns a
port beside the gathered input (``ports``), so that autograd hands its backward every dy at once:

1. launch the all-gather of x, from the saved shard,
2. sum the input gradients, and launch their reduce-scatter,
3. make the weight gradients, from the gathered x.

One communicator carries its collectives out in launch order: the gather is in flight beside the
products of 2, the reduce-scatter beside those of 3 (``tests/parity/test_launch_order.py``).

Shape letters: B batch, S sequence, s = S / tp, H hidden, o = local out features, T = S * B tokens
in the order of the collectives, R = T * k rows (token, choice) of experts, E experts, f features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.model import low_rank
from hf_sp.model.dropout import Dropout
from hf_sp.model.local import cast_for_autocast
from hf_sp.model.low_rank import FactorGradient
from hf_sp.model.ports import GatheredInput, Port
from hf_sp.model.recompute import restored, saved_form
from hf_sp.torch_private import pack, unpack, version


class ColumnLinear(Protocol):
    """Has a weight whose gradient the block's entry makes."""

    def node_parameters(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for an autograd node: DTensors, or differentiable local tensors."""


class Factor(NamedTuple):
    """A low-rank factor ``[r, H]``, replicated, that reads the gathered input.

    ``key`` asks for its output; ``p`` is the probability of the dropout in front of it.
    """

    key: object
    A: Tensor
    p: float


class Experts(NamedTuple):
    """Experts' weights, ``width`` = 2f features each, that read the gathered input.

    ``key`` asks for the ports.

    ``gradient`` makes the weight's gradient from what experts have sent to their ports, d gate_up
    ``[R, 2f]``, the rows' places ``[R]`` and ends ``[E]``, and from x ``[T, H]``.
    """

    key: object
    weight: Tensor
    width: int
    top_k: int
    gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def gather_columns(
    x: Tensor,
    linears: Sequence[tuple[object, ColumnLinear]],
    axis: Axis,
    *,
    sharded: bool,
    length: int | None,
    batch_major: bool = False,
    contiguous: bool = False,
    factors: Sequence[Factor] = (),
    experts: Experts | None = None,
) -> GatheredInput:
    """Gather a block's input for its column linears, and for whatever else reads it.

    Shapes:   x [B, s, H] -> [B, S, H] (``sharded``), or [B, S, H] -> the same
    Forward:  1 all-gather if ``sharded``, else none
    Backward: ``sharded``: 1 all-gather (of x again, for the weight gradients; none if all column
              weights are frozen) and 1 reduce-scatter; else 1 all-reduce. Factors add their rank
              to the columns of that, and ``sharded`` 1 all-reduce of their gradients.
    Saves:    the local weights; if one of them needs a gradient, x (the shard), or where x is
              computed again, what that needs
    Source:   Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2

    Args:
        x: hidden states between blocks.
        linears: the block's column linears: who asks, and who has the weight.
        axis: the tp axis.
        sharded: whether x is a sequence shard.
        length: true sequence length, None to keep the padding rows.
        batch_major: layout of the linears' outputs.
        contiguous: the gathered tensor is contiguous as ``[B, S, H]``: its block flattens it.
        factors: low-rank factors that read the gathered tensor.
        experts: an expert weight that reads it.
    """
    if not torch.is_grad_enabled():
        x = cast_for_autocast(x, x)
        full = comm.gather_sequence(x, length, axis) if sharded else x
        full = full.contiguous() if contiguous else full
        return GatheredInput(full, version(full), batch_major, 1, {}, full.shape)
    function, inputs = saved_form(x)
    x = cast_for_autocast(x, x)
    parameters: list[Tensor | None] = []
    for _, linear in linears:
        parameters += linear.node_parameters(x)
    parameters += [factor.A for factor in factors]
    parameters += [] if experts is None else [experts.weight]
    draws = {p: Dropout.draw(p) for p in {factor.p for factor in factors}}
    dropouts = [draws[factor.p] for factor in factors]
    spec = _Spec(axis, sharded, length, contiguous, len(linears), dropouts, experts, function)
    values, specs = unpack(parameters)
    saved = None if function is None else inputs
    full, *outputs = _GatherColumns.apply(spec, (saved, values, specs), x, *parameters)
    ports: dict[Any, Port] = {}
    n = len(linears)
    for i, (key, _) in enumerate(linears):
        ports[key] = Port((outputs[i],), values[2 * i], values[2 * i + 1])
    for j, factor in enumerate(factors):
        ports[factor.key] = Port((outputs[n + j],), values[2 * n + j], None, dropouts[j])
    if experts is not None:
        ports[experts.key] = Port(tuple(outputs[-3:]), values[-1])
    written = None if torch.compiler.is_compiling() else version(full)
    parts = axis.size if sharded else 1
    return GatheredInput(full, written, batch_major, parts, ports, full.shape, sharded)


@dataclass(frozen=True, slots=True)
class _Spec:
    """What the node needs besides tensors; ``linears`` is their number, weight and bias each."""

    axis: Axis
    sharded: bool
    length: int | None
    contiguous: bool
    linears: int
    dropouts: Sequence[Dropout | None]
    experts: Experts | None
    recompute: Any


@torch.library.custom_op("hf_sp::gather_again", mutates_args=())
def gather_again(x: Tensor, after: Tensor, group: str, size: int) -> Tensor:
    """An all-gather that torch's partitioner cannot merge with the forward's.

    It would save what that returns instead of the shard. ``after``, a gradient, makes it the
    backward's own.
    """
    return comm.launch_all_gather(x, Axis(group, size, -1))


@gather_again.register_fake
def _(x: Tensor, after: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(x.shape[0] * size, *x.shape[1:])


def _gather_again(x_sBH: Tensor, axis: Axis, grads: Sequence[Tensor | None]) -> Tensor:
    if not torch.compiler.is_compiling():
        return comm.launch_all_gather(x_sBH, axis)
    after = next(grad for grad in grads if grad is not None)
    return torch.ops.hf_sp.gather_again(x_sBH.contiguous(), after, axis.group, axis.size)


def _ordered(x: Tensor, spec: _Spec) -> Tensor:
    # In the order of the collectives: sequence first, if x is gathered.
    return x.transpose(0, 1) if spec.sharded else x


def _tokens(x: Tensor, spec: _Spec) -> Tensor:
    return _ordered(x, spec).reshape(-1, x.shape[-1])


class _GatherColumns(Node):
    @staticmethod
    def forward(
        ctx: Any, spec: _Spec, given: Any, x: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        # What x is computed from, if it is not saved, and the parameters, unpacked.
        inputs, values, ctx.specs = given
        ctx.spec, ctx.dtype = spec, x.dtype
        ctx.set_materialize_grads(False)
        n = spec.linears
        weights = values[: 2 * n : 2] + values[2 * n :]
        inputs = (x,) if inputs is None else inputs
        # Nothing reads x again if all is frozen.
        ctx.save_for_backward(*weights, *(inputs if any(ctx.needs_input_grad[3:]) else ()))
        if spec.sharded:
            full = comm.gather_sequence(x, spec.length, spec.axis)
        else:
            full = x.view_as(x)
        full = full.contiguous() if spec.contiguous else full
        B, S = ctx.shape = full.shape[:2]
        shapes = [(B, S, w.shape[0]) for w in weights[: n + len(spec.dropouts)]]
        ports = [x.new_empty_strided(shape, (0, 0, 0)) for shape in shapes]
        if spec.experts is not None:
            # The places of rows travel as gradients: float64 holds them exactly.
            w, rows = weights[-1], B * S * spec.experts.top_k
            ports.append(x.new_empty_strided((rows, spec.experts.width), (0, 0)))
            ports.append(x.new_empty_strided((rows,), (0,), dtype=torch.float64))
            ports.append(x.new_empty_strided((w.shape[0],), (0,), dtype=torch.float64))
        return full, *ports

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        spec: _Spec = ctx.spec
        needs, n = ctx.needs_input_grad[3:], spec.linears
        count = n + len(spec.dropouts) + (spec.experts is not None)
        saved = ctx.saved_tensors
        weights, inputs = saved[:count], saved[count:]
        dfull, dys = grads[0], [None if g is None else _tokens(g, spec) for g in grads[1 : n + 1]]
        dus = [
            FactorGradient(2 * n + j, _ordered(du, spec), weights[n + j], spec.dropouts[j])
            for j, du in enumerate(grads[n + 1 : n + 1 + len(spec.dropouts)])
            if du is not None
        ]
        experts = spec.experts if spec.experts and needs[-1] and grads[-3] is not None else None
        rows = [i for i in range(n) if dys[i] is not None and needs[2 * i]]
        trains = [bool(needs[du.slot]) for du in dus]
        shard = flying = None
        if rows or experts is not None or True in trains:
            shard = _ordered(restored(spec.recompute, inputs).to(ctx.dtype), spec)
        if shard is not None and (rows or experts is not None):
            flying = _gather_again(shard, spec.axis, grads) if spec.sharded else shard
        # The gather is in flight beside these products,
        wants_dx = ctx.needs_input_grad[2]
        dx = _input_gradient(ctx, dfull, dys, weights) if wants_dx else None
        if dus:
            S = dus[0].du.shape[0]
            height = comm.padded(S, spec.axis.size) if spec.sharded else S
            dx = low_rank.join_gradients(dx, dus, height)
        if dx is not None:
            launch = comm.launch_reduce_scatter if spec.sharded else comm.launch_all_reduce
            dx = launch(dx, spec.axis)
        # and the reduce-scatter beside these.
        out: list[Tensor | None] = [None] * len(needs)
        if flying is not None:
            full = comm.wait(flying)[: ctx.shape[1]] if spec.sharded else flying
            x_TH = full.reshape(-1, full.shape[-1])
        for i, dy in enumerate(dys):
            if dy is not None and needs[2 * i]:
                out[2 * i] = dy.t() @ x_TH
            if dy is not None and needs[2 * i + 1]:
                out[2 * i + 1] = dy.sum(0)
        if experts is not None:
            dgate_up, places, ends = cast(tuple[Tensor, Tensor, Tensor], grads[-3:])
            # Batch-major, as the experts have counted their rows.
            flat = _tokens(full, spec)
            out[-1] = experts.gradient(dgate_up, places.long(), ends.int(), flat)
        dx = None if dx is None else comm.wait(dx)
        if dus:
            dx, dAs = low_rank.split_gradients(
                cast(Tensor, dx), dus, shard, trains, wants_dx, spec.axis, spec.sharded
            )
            for du, dA in zip(dus, dAs, strict=True):
                out[du.slot] = dA
        return None, None, None if dx is None else _ordered(dx, spec), *pack(out, ctx.specs)


def _input_gradient(
    ctx: Any, dfull: Tensor | None, dys: list[Tensor | None], weights: Sequence[Tensor]
) -> Tensor | None:
    """The block's partial input gradient, ordered, and padded if it is to be scattered."""
    spec: _Spec = ctx.spec
    used = [(dy, w) for dy, w in zip(dys, weights, strict=False) if dy is not None]
    if not used:
        if dfull is None:
            return None
        dfull = _ordered(dfull, spec)
        return comm.pad_sequence(dfull, spec.axis) if spec.sharded else dfull
    first, others = ctx.shape[::-1] if spec.sharded else ctx.shape
    height = comm.padded(first, spec.axis.size) if spec.sharded else first
    (dy, weight), *rest = used
    dx = dy.new_empty(height, others, weight.shape[1])
    rows = dx[:first].view(first * others, -1)
    if height > first:
        dx[first:].zero_()
    torch.mm(dy, weight, out=rows)
    for dy, weight in rest:
        rows.addmm_(dy, weight)
    if dfull is not None:
        dx[:first] += _ordered(dfull, spec)
    return dx
