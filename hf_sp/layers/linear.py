"""Column and row parallel linears, and the entry of a TP block that owns their weight gradients.

How a block saves only its shard (Korthikanti et al. 2022, section 4.2.2, for separate q/k/v):

- ``enter_block`` gathers the block's input once. Its autograd node saves the *shard* and takes the
  block's column weights as inputs, because it is the node that makes their gradients.
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

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_sp import collectives as comm
from hf_sp.collectives import Axis
from hf_sp.layers import factors
from hf_sp.layers.factors import EntryReader, FactorGradient
from hf_sp.layers.local import cast_for_autocast, local
from hf_sp.torch_private import graph_task

ENTRY = "_hf_sp_entry"
"""Attribute of a gathered tensor: the entry that made it."""


class ParallelLinear(nn.Linear):
    """Base of the parallel linears: an ``nn.Linear`` in place, with *local* in/out_features.

    Local, because adapters size their factors from them. Made by changing the class of the HF
    module, so that its name, hooks and identity stay.
    """

    axis: Axis
    # Rows of a weight that is stored whole (k/v heads fewer than tp): (first row, rows).
    rows: tuple[int, int] | None = None

    def local_parameters(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Local weight and bias as this forward uses them, differentiable."""
        bias = None if self.bias is None else self._local(self.bias, like)
        return self._local(self.weight, like), bias

    def _local(self, parameter: Tensor, like: Tensor) -> Tensor:
        tensor = local(parameter)
        if self.rows is not None:
            # Each rank uses its head's rows only: the whole gradient is the sum over ranks.
            tensor = comm.identity_allreduce(tensor, self.axis).narrow(0, *self.rows)
        return cast_for_autocast(tensor, like)

    def extra_repr(self) -> str:
        """Local sizes and the place on the tp axis."""
        return f"{super().extra_repr()}, tp={self.axis.size}, tp_rank={self.axis.rank}"


class ColumnParallelLinear(ParallelLinear):
    """Linear whose output features are split over tp, or stored whole for k/v heads fewer than tp.

    Shapes:   x [B, S, H] -> [B, S, o], o = O / tp
    Forward:  no collective (the block's entry has gathered x)
    Backward: no collective; the input gradient is partial and leaves through the block's entry
    Saves:    the weight. On an input that did not come from the block's entry (changed on the way):
              an ordinary linear, which also saves its input.
    """

    @classmethod
    def take_over(cls, module: nn.Linear, axis: Axis, heads: int = 0) -> None:
        """Make an ``nn.Linear`` one of these, in place.

        Args:
            module: the linear.
            axis: the tp axis.
            heads: number of heads of a linear with fewer heads than ranks, else 0.
        """
        module.__class__ = cls
        self = cast(ColumnParallelLinear, module)
        self.axis = axis
        if heads:
            # Ranks r * tp / heads to (r + 1) * tp / heads share head r.
            width = module.out_features // heads
            self.rows = (axis.rank * heads // axis.size * width, width)
            self.out_features = width
        else:
            self.out_features //= axis.size

    def forward(self, x: Tensor) -> Tensor:
        """Apply the local rows of the weight."""
        entry: Entry | None = getattr(x, ENTRY, None)
        slot = entry.slots.get(id(self)) if entry is not None else None
        if entry is None or slot is None:
            weight, bias = self.local_parameters(x)
            return F.linear(cast_for_autocast(x, x), weight, bias)
        weight, bias = entry.parameters[slot]
        if not torch.is_grad_enabled():
            return F.linear(x, weight, bias)
        return _ColumnLinear.apply(
            entry, slot, x, weight.detach(), None if bias is None else bias.detach()
        )


class RowParallelLinear(ParallelLinear):
    """Linear whose input features are split over tp; returns a *partial* sum.

    The block's exit reduces it, so that what is added to it on the way (an adapter's own partial)
    shares the one collective. The bias is added by tp rank 0 only. Its gradient is computed by all
    ranks from the gathered output gradient, is whole on each and needs no sum.

    Shapes:   x [B, S, f] -> [B, S, H] partial, sequence-major inside under sp
    Forward:  no collective
    Backward: no collective; the output gradient is whole
    Saves:    x, the weight
    """

    sp: bool

    @classmethod
    def take_over(cls, module: nn.Linear, axis: Axis, *, sp: bool) -> None:
        """Make an ``nn.Linear`` one of these, in place."""
        module.__class__ = cls
        self = cast(RowParallelLinear, module)
        self.axis, self.sp = axis, sp
        self.in_features //= axis.size

    def forward(self, x: Tensor) -> Tensor:
        """Apply the local columns of the weight."""
        weight, bias = self.local_parameters(x)
        return _RowLinear.apply(cast_for_autocast(x, x), weight, bias, self.axis.rank == 0, self.sp)


@dataclass(eq=False)
class Entry:
    """What the entry and the column linears of one block share during one forward.

    Holds no tensor across the forward but the local weights, dropped at the block's exit; during
    backward, the block's input gradient and the output gradients that wait for the entry.
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
    du: list[FactorGradient] = field(default_factory=list)

    def close(self) -> None:
        """The block has run: its weights are in autograd's hands now."""
        self.parameters = []

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
        self._begin()
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

    def _begin(self) -> None:
        # What an earlier backward has left, one that ended before the entry, is not this one's.
        task = graph_task()
        if task != self.task:
            self.task, self.dx, self.dy, self.du = task, None, {}, []

    def receive_factor(self, slot: int, du: Tensor, A: Tensor, dropout: Any) -> None:
        """A factor's output gradient ``[B, S, r]``, partial: it shares the entry's reduction."""
        self._begin()
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
    linears: Sequence[ColumnParallelLinear],
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
    Saves:    x (the shard), if some column weight or factor needs a gradient
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
    x = cast_for_autocast(x, x)
    flat: list[Tensor | None] = []
    for slot, linear in enumerate(linears):
        entry.slots[id(linear)] = slot
        entry.parameters.append(linear.local_parameters(x))
        flat += entry.parameters[-1]
        entry.trains.append(any(t is not None and t.requires_grad for t in entry.parameters[-1]))
    for reader in readers:
        for key, factor in reader.entry_factors(x):
            entry.slots[key] = len(entry.parameters)
            entry.parameters.append((factor, None))
            flat += entry.parameters[-1]
    full = _Enter.apply(entry, x, *flat)
    setattr(full, ENTRY, entry)
    return full, entry


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entry: Entry, x: Tensor, *flat: Tensor | None) -> Tensor:
        ctx.entry = entry
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad[2::2]):
            ctx.save_for_backward(x)
        if entry.sharded:
            return comm.gather_sequence(x, entry.length, entry.axis)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        entry: Entry = ctx.entry
        dys, entry.dy = entry.dy, {}
        dus, entry.du = entry.du, []
        partial = entry.take_input_gradient(grads[0])
        if not ctx.needs_input_grad[1]:
            partial = None
        if dus:
            rows = dus[0].du.shape[0]
            height = comm.padded(rows, entry.axis.size) if entry.sharded else rows
            partial = factors.join_gradients(partial, dus, height)
        launched = None
        if partial is not None:
            launch = comm.launch_reduce_scatter if entry.sharded else comm.launch_all_reduce
            launched = launch(partial, entry.axis)
        # Once: under checkpointing saved tensors can be unpacked a single time.
        saved = ctx.saved_tensors
        ctx.input = saved[0] if saved else None
        # The weight gradients run while the reduction is in flight.
        flat = _weight_gradients(ctx, entry, dys)
        dx = None if launched is None else comm.wait(launched)
        if dus:
            assert dx is not None
            dx = _factor_gradients(ctx, entry, dus, dx, flat)
        ctx.input = None
        return None, None if dx is None else entry.buffer_order(dx), *flat


def _factor_gradients(
    ctx: Any, entry: Entry, dus: list[FactorGradient], reduced: Tensor, flat: list[Tensor | None]
) -> Tensor | None:
    """Gradients of the factors, put into ``flat``, and the block's input gradient."""
    needs = [bool(ctx.needs_input_grad[2 + 2 * one.slot]) for one in dus]
    x = entry.buffer_order(ctx.input) if any(needs) else None
    wants_dx = bool(ctx.needs_input_grad[1])
    dx, grads = factors.split_gradients(reduced, dus, x, needs, wants_dx, entry.axis, entry.sharded)
    for one, grad in zip(dus, grads, strict=True):
        if grad is not None:
            flat[2 * one.slot] = _plus(flat[2 * one.slot], grad)
    return dx


def _weight_gradients(ctx: Any, entry: Entry, dys: dict[int, list[Tensor]]) -> list[Tensor | None]:
    """Gradients of the entry's flat (weight, bias, weight, bias, ...) inputs."""
    needs = ctx.needs_input_grad[2:]
    flat: list[Tensor | None] = [None] * len(needs)
    x_TH = None
    for slot, several in dys.items():
        for dy_To in several:
            if needs[2 * slot]:
                if x_TH is None:
                    x = ctx.input
                    full = comm.gather_sequence(x, entry.length, entry.axis) if entry.sharded else x
                    x_TH = entry.buffer_order(full).reshape(-1, full.shape[-1])
                flat[2 * slot] = _plus(flat[2 * slot], dy_To.t() @ x_TH)
            if needs[2 * slot + 1]:
                flat[2 * slot + 1] = _plus(flat[2 * slot + 1], dy_To.sum(0))
    return flat


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


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add_bias: bool, sharded: bool
    ) -> Tensor:
        ctx.sharded = sharded
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        # The reduce-scatter wants [S, B, H]: permute the 1/tp-size input, not the full-size output.
        y = F.linear(x.transpose(0, 1) if sharded else x, weight, bias if add_bias else None)
        return y.transpose(0, 1) if sharded else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        dx = dw = db = None
        # Same token order on both sides of the products; sequence-major costs no full-size copy.
        dy = grads[0].transpose(0, 1) if ctx.sharded else grads[0]
        dy_TH = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = (dy_TH @ weight).view(*dy.shape[:2], -1)
            dx = dx.transpose(0, 1) if ctx.sharded else dx
        if ctx.needs_input_grad[1]:
            x = x.transpose(0, 1) if ctx.sharded else x
            dw = dy_TH.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            db = dy_TH.sum(0)
        return dx, dw, db, None, None
