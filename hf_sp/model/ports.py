"""How what reads a block's gathered input finds it, and where it sends its output gradient.

A port is a tensor of the shape of a reader's output with strides of zero and no memory; the block's
entry (``columns``) has made it, and is sent its gradient.

Shape letters: B batch, S sequence, H hidden, o local out features, r rank of a low-rank factor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.model.dropout import Dropout
from hf_sp.torch_private import has_gradient_hooks, version

_PORTS = "_hf_sp_ports"


class Port(NamedTuple):
    """Where a reader of the gathered input sends its gradient, and its local weight and bias."""

    outputs: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None = None
    dropout: Dropout | None = None


@dataclass(eq=False, slots=True)
class GatheredInput:
    """A block's gathered input, and the ports of its readers, for one forward.

    A tensor is taken for the gathered one if it is that object (or, for a block that flattens it, a
    view of all of it), nobody has written into it, and nobody watches its gradient, which would go
    by.

    Args:
        x: ``[B, S, H]``.
        version: of x, as it was made.
        batch_major: the readers' outputs are laid out as ``[B, S, o]`` (for attention), and not
            sequence-major.
        parts: owners of the rows of x, for the masks of dropout.
        ports: by reader.
        sequence_major: whether it lies so in memory, as it is gathered.
        dropped: x after dropout, by draw: one for all factors of the block.
    """

    x: Tensor
    version: int | None
    batch_major: bool
    parts: int
    ports: dict[Any, Port]
    sequence_major: bool = False
    dropped: dict[int, Tensor] = field(default_factory=dict)

    def port(self, reader: object, x: Tensor) -> Port | None:
        """The reader's port, if ``x`` is the gathered tensor."""
        return self.ports[reader] if reader in self.ports and self.reads(x) else None

    def reads(self, x: Tensor) -> bool:
        """Whether ``x`` is the gathered tensor, as it was made."""
        full = self.x
        if torch.compiler.is_compiling():
            return x is full
        return (
            (x is full or _is_view(x, full))
            and version(x) == self.version
            and not has_gradient_hooks(full)
            and not has_gradient_hooks(x)
        )


def _is_view(x: Tensor, full: Tensor) -> bool:
    """Whether x is the whole of the gathered tensor in another shape, as HF flattens it."""
    base = full if full._base is None else full._base
    return (
        x._base is base
        and x.numel() == full.numel()
        and x.shape[-1] == full.shape[-1]
        and x.storage_offset() == full.storage_offset()
        and x.is_contiguous()
        and x.requires_grad == full.requires_grad
    )


@dataclass(slots=True)
class BlockInput:
    """What the hooks of a block tell its modules while it runs.

    Args:
        gathered: the gathered input; None outside of the block's forward, and without autograd.
        partial: the row linear's output, and the same with padding rows, which need not be copied
            then to be reduce-scattered.
    """

    gathered: GatheredInput | None = None
    partial: tuple[Tensor, Tensor] | None = None

    def close(self) -> None:
        """The block has run. What it was given keeps its ports, for as long as it lives itself."""
        gathered = self.gathered
        if gathered is not None and gathered.version is not None:
            known = gathered.version, gathered.batch_major, gathered.parts, gathered.ports
            gathered.x.__dict__[_PORTS] = (*known, gathered.sequence_major)
        self.gathered = self.partial = None


def gathered_before(x: Tensor) -> GatheredInput | None:
    """Of x that a checkpoint in its block reads again in backward: it saves what it did before."""
    # A tracer cannot look into a tensor's __dict__.
    known = None if torch.compiler.is_compiling() else x.__dict__.get(_PORTS)
    return None if known is None else GatheredInput(x, *known)


def column_linear(x: Tensor, port: Port, batch_major: bool) -> Tensor:
    """``x W^T + b`` of the gathered x; its gradient goes to the port."""
    return _Column.apply(x, port.outputs[0], port.weight, port.bias, batch_major)


class _Column(Node):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, port: Tensor, weight: Tensor, bias: Tensor | None, batch_major: bool
    ) -> Tensor:
        ctx.shape = port.shape
        if x.is_contiguous():
            return F.linear(x, weight, bias)
        # Sequence-major, as it was gathered.
        y = F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
        # Attention kernels lay their output out as the query: batch first, or HF's
        # .contiguous() behind them would keep a second copy of it.
        return y.contiguous() if batch_major else y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy = grads[0]
        return None, dy if dy.shape == ctx.shape else dy.reshape(ctx.shape), None, None, None


def low_rank_column(x: Tensor, port: Port, gathered: GatheredInput) -> Tensor:
    """``A x`` of a factor that reads the gathered x, after its dropout; du goes to the port.

    Shapes:   x [B, S, H] -> u [B, S, r] in A's dtype, equal on all ranks
    Forward, backward: no collective
    Saves:    nothing
    """
    # Some blocks flatten what was gathered.
    drop, seen = port.dropout, x.detach().view(gathered.x.shape)
    seen = seen.transpose(0, 1) if gathered.sequence_major else seen
    if drop is not None:
        # One mask, and one pass over x, for all factors of the block.
        if id(drop) not in gathered.dropped:
            gathered.dropped[id(drop)] = drop.parts(seen, gathered.parts)
        seen = gathered.dropped[id(drop)]
    A = port.weight if drop is None else port.weight * drop.scale
    order = gathered.sequence_major, gathered.batch_major
    return _LowRankColumn.apply(x, port.outputs[0], A, seen, *order)


class _LowRankColumn(Node):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        port: Tensor,
        A: Tensor,
        seen: Tensor,
        sequence_major: bool,
        batch_major: bool,
    ) -> Tensor:
        # ``seen`` is x in its order in memory, after dropout.
        ctx.dtype, ctx.shape = port.dtype, port.shape
        u = F.linear(seen.to(A.dtype), A)
        u = u.transpose(0, 1) if sequence_major else u
        u = u.contiguous() if batch_major else u
        return u if u.dim() == x.dim() else u.flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0].to(ctx.dtype).reshape(ctx.shape), None, None, None, None
