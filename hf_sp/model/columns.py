"""The entry of a TP block: one gather, one reduction, and the weight gradients of its columns.

How a block saves only its shard (Korthikanti et al. 2022, section 4.2.2, for separate q/k/v):

- ``enter_block`` gathers the block's input once. Its autograd node saves the *shard*, or what the
  shard is made of (``model/recompute.py``), and takes the block's column weights as inputs, because
  it is the node that makes their gradients.
- Each column linear computes ``x W^T`` and saves only W. Its backward adds its input gradient to
  one buffer shared by the block and leaves dy for the entry.
- Autograd runs the entry's backward when all consumers of the gathered tensor have run: one
  all-gather of x and one reduce-scatter of the summed input gradient, which on a GPU is in flight
  while the weight gradients are computed.

The gathered tensor is an ordinary differentiable tensor: anything else in the block may consume it
(an adapter, a router), and its gradient joins the same reduce-scatter.

Shape letters: B batch, S sequence, s = S / tp, H hidden, O out features of a whole linear,
o = local out features, f = local in features of a row linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.model import factors
from hf_sp.model.entered import Member, mark_entered
from hf_sp.model.factors import EntryReader, FactorGradient
from hf_sp.model.local import cast_for_autocast
from hf_sp.model.recompute import Recipe, recipe_of
from hf_sp.torch_private import graph_task


@dataclass(eq=False)
class Entry:
    """What the entry and the column linears of one block share during one forward.

    Holds no tensor across the forward but the local weights, dropped at the block's exit; during
    backward, the block's input gradient and the output gradients that wait for the entry.

    The entry of a block that works on flattened tokens is in ``moe/flat.py``.
    """

    axis: Axis
    sharded: bool
    length: int | None
    batch_major: bool
    slots: dict[int, int] = field(default_factory=dict)
    parameters: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    trains: list[bool] = field(default_factory=list)
    task: int = -1
    dx: Tensor | None = None
    dy: dict[int, list[Tensor]] = field(default_factory=dict)
    later: list[tuple[int, Callable[[Tensor], Tensor]]] = field(default_factory=list)
    du: list[FactorGradient] = field(default_factory=list)

    def close(self) -> None:
        """The block has run: its weights are in autograd's hands now."""
        self.parameters = []

    def begin(self) -> None:
        """Forget what an earlier backward has left, one that ended before the entry."""
        task = graph_task()
        if task != self.task:
            self.task, self.dx, self.dy, self.later, self.du = task, None, {}, [], []

    def gather(self, x: Tensor) -> Tensor:
        """The block's input, from what it is given."""
        return comm.gather_sequence(x, self.length, self.axis) if self.sharded else x.view_as(x)

    def launch(self, partial: Tensor) -> Tensor:
        """Start the reduction of the block's input gradient."""
        launch = comm.launch_reduce_scatter if self.sharded else comm.launch_all_reduce
        return launch(partial, self.axis)

    def landed(self, launched: Tensor) -> Tensor:
        """The reduced input gradient, in the layout of x."""
        return self.buffer_order(comm.wait(launched))

    def tokens(self, x: Tensor) -> Tensor:
        """``[tokens, H]`` in the order of the gradients that wait: x, gathered again."""
        full = comm.gather_sequence(x, self.length, self.axis) if self.sharded else x
        return self.buffer_order(full).reshape(-1, full.shape[-1])

    def buffer_order(self, x: Tensor) -> Tensor:
        """``[B, S, F]`` in the order of the collective's buffer: sequence first if sharded."""
        return x.transpose(0, 1) if self.sharded else x

    def receive(self, slot: int, dy: Tensor, weight: Tensor, keep: bool) -> None:
        """A column linear's output gradient: add ``dy W`` to the block's input gradient.

        Args:
            slot: the linear's place in the entry.
            dy: ``[B, S, o]``.
            weight: ``[o, H]``.
            keep: whether the entry needs dy for a weight or bias gradient.
        """
        self.begin()
        dy = self.buffer_order(dy)
        rows, others, features = dy.shape
        dy_To = dy.reshape(rows * others, features)
        if keep:
            self.dy.setdefault(slot, []).append(dy_To)
        if self.dx is None:
            height = comm.padded(rows, self.axis.size) if self.sharded else rows
            self.dx = dy.new_empty(height, others, weight.shape[1])
            self.dx[rows:].zero_()
            torch.mm(dy_To, weight, out=self.dx[:rows].view(rows * others, -1))
        else:
            self.dx[:rows].view(rows * others, -1).addmm_(dy_To, weight)

    def receive_factor(self, slot: int, du: Tensor, A: Tensor, dropout: Any) -> None:
        """A factor's output gradient ``[B, S, r]``, partial: it shares the entry's reduction."""
        self.begin()
        self.du.append(FactorGradient(slot, self.buffer_order(du), A, dropout))

    def take_input_gradient(self, extra_BSH: Tensor | None) -> Tensor | None:
        """The block's summed partial input gradient in buffer order, padded; forgets it.

        Args:
            extra_BSH: what consumers other than the column linears have sent.
        """
        dx, self.dx = self.dx, None
        if extra_BSH is None:
            return dx
        extra = self.buffer_order(extra_BSH)
        if dx is None:
            return comm.pad_sequence(extra, self.axis) if self.sharded else extra
        dx[: extra.shape[0]] += extra
        return dx


def enter_block(
    x: Tensor,
    linears: Sequence[Member],
    axis: Axis,
    *,
    sharded: bool,
    length: int | None,
    batch_major: bool,
    readers: Sequence[EntryReader] = (),
) -> tuple[Tensor, Entry]:
    """Gather a block's input for its column linears, and for the factors of adapters.

    Shapes:   x [B, s, H] -> [B, S, H] (``sharded``), or [B, S, H] -> the same
    Forward:  1 all-gather if ``sharded``, else none
    Backward: ``sharded``: 1 all-gather (of x again, for the weight gradients; none if all column
              weights are frozen) and 1 reduce-scatter; else 1 all-reduce. Factors add their rank
              to the columns of that, and ``sharded`` 1 all-reduce of their gradients.
    Saves:    if some column weight or factor needs a gradient: x (the shard), or where x is a
              norm's output that is made again, what the norm saves anyway
    Source:   Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2

    Args:
        x: hidden states between blocks.
        linears: the block's column linears.
        axis: the tp axis.
        sharded: whether x is a sequence shard.
        length: true sequence length, None to keep the padding rows.
        batch_major: lay the column linears' outputs out as ``[B, S, o]`` (for attention) and not
            sequence-major.
        readers: the block's modules with factors that read the gathered tensor.

    Returns:
        The gathered tensor, known to the column linears, and the entry, to be closed on exit.
    """
    entry = Entry(axis, sharded, length, batch_major)
    return open_entry(entry, x, [(linear, linear) for linear in linears], readers), entry


def open_entry(
    entry: Entry,
    x: Tensor,
    members: Sequence[tuple[object, Member]],
    readers: Sequence[EntryReader] = (),
) -> Tensor:
    """Gather ``x`` and hand the weights of its members to the entry.

    Args:
        entry: a new entry.
        x: the block's input.
        members: the module that asks for its weights, and who has them.
        readers: modules with factors that read the gathered tensor.
    """
    recipe = recipe_of(x)
    x = cast_for_autocast(x, x)
    flat: list[Tensor | None] = []
    for slot, (module, member) in enumerate(members):
        entry.slots[id(module)] = slot
        entry.parameters.append(member.local_parameters(x))
        flat += entry.parameters[-1]
        entry.trains.append(any(t is not None and t.requires_grad for t in entry.parameters[-1]))
    for reader in readers:
        for key, factor in reader.entry_factors(x):
            entry.slots[key] = len(entry.parameters)
            entry.parameters.append((factor, None))
            entry.trains.append(factor.requires_grad)
            flat += entry.parameters[-1]
    full = _Enter.apply(entry, recipe, x, *flat)
    mark_entered(full, entry)
    return full


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, entry: Entry, recipe: Recipe | None, x: Tensor, *flat: Tensor | None
    ) -> Tensor:
        ctx.entry = entry
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad[3::2]):
            ctx.make, ctx.dtype = None if recipe is None else recipe.make, x.dtype
            ctx.save_for_backward(*((x,) if recipe is None else recipe.ingredients))
        return entry.gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        entry: Entry = ctx.entry
        # This backward may have come by none of the columns.
        entry.begin()
        dys, entry.dy = entry.dy, {}
        dus, entry.du = entry.du, []
        partial = entry.take_input_gradient(grads[0])
        if not ctx.needs_input_grad[2]:
            partial = None
        if dus:
            rows = dus[0].du.shape[0]
            height = comm.padded(rows, entry.axis.size) if entry.sharded else rows
            partial = factors.join_gradients(partial, dus, height)
        launched = None
        if partial is not None:
            launched = entry.launch(partial)
        # The weight gradients run while the reduction is in flight.
        needs = ctx.needs_input_grad[3:]
        asks = [slot for slot in dys if needs[2 * slot]] + [
            d.slot for d in dus if needs[2 * d.slot]
        ]
        # Once: under checkpointing saved tensors can be unpacked a single time.
        x = _saved_input(ctx) if asks or entry.later else None
        flat = _weight_gradients(needs, entry, dys, x)
        if not dus:
            dx = None if launched is None else entry.landed(launched)
            return None, None, dx, *flat
        assert launched is not None
        dx = _factor_gradients(ctx, entry, dus, comm.wait(launched), x, flat)
        return None, None, None if dx is None else entry.buffer_order(dx), *flat


def _factor_gradients(
    ctx: Any,
    entry: Entry,
    dus: list[FactorGradient],
    reduced: Tensor,
    x: Tensor | None,
    flat: list[Tensor | None],
) -> Tensor | None:
    """Gradients of the factors, put into ``flat``, and the block's input gradient."""
    wants_dx, needs = bool(ctx.needs_input_grad[2]), ctx.needs_input_grad[3:]
    trains = [bool(needs[2 * one.slot]) for one in dus]
    x = entry.buffer_order(x) if x is not None and any(trains) else None
    dx, grads = factors.split_gradients(
        reduced, dus, x, trains, wants_dx, entry.axis, entry.sharded
    )
    for one, grad in zip(dus, grads, strict=True):
        if grad is not None:
            flat[2 * one.slot] = _plus(flat[2 * one.slot], grad)
    return dx


def _weight_gradients(
    needs: Sequence[bool], entry: Entry, dys: dict[int, list[Tensor]], x: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the entry's flat (weight, bias, weight, bias, ...) inputs."""
    later, entry.later = entry.later, []
    flat: list[Tensor | None] = [None] * len(needs)
    x_TH = None
    if later or any(needs[2 * slot] for slot in dys):
        assert x is not None
        x_TH = entry.tokens(x)
    for slot, several in dys.items():
        for dy_To in several:
            if needs[2 * slot]:
                assert x_TH is not None
                flat[2 * slot] = _plus(flat[2 * slot], dy_To.t() @ x_TH)
            if needs[2 * slot + 1]:
                flat[2 * slot + 1] = _plus(flat[2 * slot + 1], dy_To.sum(0))
    for slot, make in later:
        assert x_TH is not None
        flat[2 * slot] = _plus(flat[2 * slot], make(x_TH))
    return flat


def _saved_input(ctx: Any) -> Tensor:
    if ctx.make is None:
        (x,) = ctx.saved_tensors
        return x
    # As the forward made it, cast for autocast too.
    return ctx.make(*ctx.saved_tensors).to(ctx.dtype)


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, entry: Entry, slot: int, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.entry, ctx.slot, ctx.keep = entry, slot, entry.trains[slot]
        ctx.save_for_backward(weight)
        y = entry.buffer_order(F.linear(entry.buffer_order(x), weight, bias))
        # Attention kernels lay their output out as the query: batch first, or HF's
        # .contiguous() behind them would keep a second copy of it. No copy for B = 1.
        return y.contiguous() if entry.batch_major else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        ctx.entry.receive(ctx.slot, grads[0], weight, ctx.keep)
        return None, None, None, None, None


def entered_linear(x: Tensor, entry: Entry, slot: int) -> Tensor:
    """``x W^T`` of a member of the entry that has gathered ``x``; see ``ColumnParallelLinear``."""
    weight, bias = entry.parameters[slot]
    if not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return _ColumnLinear.apply(
        entry, slot, x, weight.detach(), None if bias is None else bias.detach()
    )
