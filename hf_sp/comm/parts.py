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
    """How a sequence is cut over the cp ranks: a stretch each, in rank order, padded at the end.

    Args:
        axis: the cp ranks.
        multiple: of which a part's length is one: tp, where tp cuts it further.
    """

    axis: Axis
    multiple: int = 1

    def length(self, S: int) -> int:
        """Tokens of a part, padding counted."""
        return comm.padded(S, self.axis.size * self.multiple) // self.axis.size

    def real(self, S: int) -> int:
        """How many of this rank's part are no padding."""
        P = self.length(S)
        return min(max(S - self.axis.rank * P, 0), P)

    def take(self, x: Tensor, dim: int, fill: float = 0) -> Tensor:
        """This rank's part along ``dim``; a view, where nothing is padded."""
        S = x.shape[dim]
        P, real = self.length(S), self.real(S)
        own = x.narrow(dim, min(self.axis.rank * P, S), real)
        if real == P:
            return own
        after = x.dim() - 1 - dim % x.dim()
        return F.pad(own, (0, 0) * after + (0, P - real), value=fill)

    def gather(self, x_BPH: Tensor, S: int) -> Tensor:
        """All ranks' parts as ``[B, S, H]``; 1 all-gather."""
        return comm.gather_sequence(x_BPH, S, self.axis)


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
