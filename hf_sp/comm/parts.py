"""The parts of a sequence that context parallel ranks hold, and the ends of what is cut so.

Outside of the decoder's stack every rank of a cp group computes the same, on the whole sequence,
and holds whole gradients. Inside each has the tokens of its part, and **cp times** the part of the
gradient that these make: FSDP's mean over the cp ranks is the whole gradient of either kind.

Shape letters: B batch, S sequence, P tokens of a part, H features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis


@dataclass(frozen=True, slots=True)
class Parts:
    """How a sequence, padded at its end, is cut over the cp ranks.

    A ring of places, each of so many neighbouring ranks. The sequence is ``2 ring`` stretches, and
    place i has the stretches i and ``2 ring - 1 - i``: under a causal mask all have the same work.
    Its ranks have a slice each of these two, put behind each other. A ring of one place is the
    sequence in rank order. Real tokens are at the front of each part.

    Args:
        axis: the cp ranks.
        multiple: of which a part's length is one: tp, where tp cuts it further.
        ring: places of the ring, a divisor of the number of ranks.
        inner: the ranks of one place; None where there is one place.
        outer: the ranks that have this one's slice in the other places; None likewise.
    """

    axis: Axis
    multiple: int = 1
    ring: int = 1
    inner: Axis | None = None
    outer: Axis | None = None

    @property
    def ulysses(self) -> Axis:
        """The ranks that exchange heads for tokens: those of one place."""
        return self.inner or self.axis

    def length(self, S: int) -> int:
        """Tokens of a part, padding counted."""
        ranks, even = self.axis.size // self.ring, self.ring > 1
        # A place has two stretches of one length.
        multiple = 2 * self.multiple if even and ranks * self.multiple % 2 else self.multiple
        return comm.padded(S, self.axis.size * multiple) // self.axis.size

    def stretches(self, S: int, place: int) -> list[tuple[int, int]]:
        """First token and real tokens of each stretch that a place of the ring has."""
        whole = self.length(S) * self.axis.size
        size = whole // (2 * self.ring)
        numbers = (place, 2 * self.ring - 1 - place)
        found = [(n * size, size) for n in numbers] if self.ring > 1 else [(0, whole)]
        return [(start, min(max(S - start, 0), n)) for start, n in found]

    def tokens(self, S: int) -> int:
        """How many real tokens this rank's place has."""
        place = self.axis.rank // (self.axis.size // self.ring)
        return sum(n for _, n in self.stretches(S, place))

    def held(self, S: int, rank: int) -> list[tuple[int, int]]:
        """First token and number of each stretch of real tokens that a rank's part consists of."""
        P, ranks = self.length(S), self.axis.size // self.ring
        place, slot = divmod(rank, ranks)
        found, before = [], 0
        for start, n in self.stretches(S, place):
            first, last = max(slot * P - before, 0), min((slot + 1) * P - before, n)
            found += [(start + first, last - first)] if last > first else []
            before += n
        return found

    def real(self, S: int) -> int:
        """How many of this rank's part are no padding."""
        return sum(n for _, n in self.held(S, self.axis.rank))

    def take(self, x: Tensor, dim: int, fill: float = 0) -> Tensor:
        """This rank's part along ``dim``; a view, where it is one stretch and nothing is padded."""
        S = x.shape[dim]
        P, found = self.length(S), self.held(S, self.axis.rank)
        pieces = [x.narrow(dim, *one) for one in found] or [x.narrow(dim, 0, 0)]
        own = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        if own.shape[dim] == P:
            return own
        after = x.dim() - 1 - dim % x.dim()
        return F.pad(own, (0, 0) * after + (0, P - own.shape[dim]), value=fill)

    def gather(self, x_BPH: Tensor, S: int) -> Tensor:
        """All ranks' parts as ``[B, S, H]``; 1 all-gather."""
        return self.in_order(comm.all_gather(x_BPH.transpose(0, 1), self.axis), S).transpose(0, 1)

    def in_order(self, x: Tensor, S: int) -> Tensor:
        """All parts in rank order, ``[cp * P, ..]``, as the sequence ``[S, ..]``; or a view."""
        if self.ring == 1:
            return x[:S]
        P, found = self.length(S), []
        for rank in range(self.axis.size):
            place = rank * P
            for start, n in self.held(S, rank):
                found.append((start, place, n))
                place += n
        return torch.cat([x.narrow(0, place, n) for _, place, n in sorted(found)])

    def by_rank(self, x: Tensor) -> Tensor:
        """A sequence ``[S, ..]`` as all parts in rank order, ``[cp * P, ..]``, with zeros between.

        The other way of ``in_order``; a view, where nothing moves and nothing is padded.
        """
        S, P = x.shape[0], self.length(x.shape[0])
        if self.ring == 1 and self.axis.size * P == S:
            return x
        pieces = []
        for rank in range(self.axis.size):
            held = self.held(S, rank)
            pieces += [x.narrow(0, *one) for one in held]
            missing = P - sum(n for _, n in held)
            pieces += [x.new_zeros(missing, *x.shape[1:])] if missing else []
        return torch.cat(pieces)


class _TakeGather(Node):
    """This rank's part of what all ranks hold alike, and of that its shard; the entry of the stack.

    Shapes:   x [B, S, H] -> [B, P, H], or [B, P / tp, H] with a tp axis; sequence-major inside
    Forward:  no collective
    Backward: 1 all-gather over cp, before that 1 over tp if given; a cp-th of it
    """

    @staticmethod
    def forward(ctx: Any, x_BSH: Tensor, parts: Parts, tp: Axis | None) -> Tensor:
        ctx.parts, ctx.tp, ctx.length = parts, tp, x_BSH.shape[1]
        own = parts.take(x_BSH.transpose(0, 1), 0)
        if tp is not None:
            s = own.shape[0] // tp.size
            own = own.narrow(0, tp.rank * s, s)
        # A view would keep the whole sequence alive for as long as a layer has saved the shard.
        return own.clone(memory_format=torch.contiguous_format).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        parts, part = ctx.parts, grads[0]
        if ctx.tp is not None:
            part = comm.gather_sequence(part, None, ctx.tp)
        return parts.gather(part, ctx.length) / parts.axis.size, None, None


class _GatherTake(Node):
    """The whole sequence for code that is the same on all cp ranks; the exit of what is cut.

    Shapes:   x [B, P, H] -> [B, S, H]
    Forward:  1 all-gather
    Backward: no collective; cp times this rank's part
    """

    @staticmethod
    def forward(ctx: Any, x_BPH: Tensor, S: int, parts: Parts) -> Tensor:
        ctx.parts = parts
        return parts.gather(x_BPH, S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.parts.take(grads[0], 1) * ctx.parts.axis.size, None, None


class _SumTimes(Node):
    """The sum of what the parts make, such as losses of tokens; the other exit of what is cut.

    Shapes:   any -> the same
    Forward:  1 all-reduce
    Backward: no collective; cp times the gradient
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts) -> Tensor:
        ctx.size = parts.axis.size
        return comm.all_reduce(x, parts.axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.size, None


class _GatherHeads(Node):
    """All heads of what each cp rank has of its own, for code that is the same on all of them.

    Shapes:   x [B, a, S, ..] -> [B, cp * a, S, ..]
    Forward:  1 all-gather
    Backward: no collective; cp times this rank's heads
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Parts) -> Tensor:
        ctx.parts, ctx.heads = parts, x.shape[1]
        return comm.all_gather(x.transpose(0, 1), parts.axis).transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        axis = ctx.parts.axis
        return grads[0].narrow(1, axis.rank * ctx.heads, ctx.heads) * axis.size, None


take_gather = _TakeGather.apply
gather_take = _GatherTake.apply
sum_times = _SumTimes.apply
gather_heads = _GatherHeads.apply
