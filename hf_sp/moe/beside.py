"""A TP block that computes while the rows of the experts beside it travel.

HF's block calls its shared expert first, and to its end. Here its entry launches the gather and
does not wait; its output is a stand-in (``LazyShared``) whose products are launched once the
experts' rows are on their way; and its exit has two halves each way (``Crossing``), so that the
reduce-scatter, and in backward the gather of its output's gradient, is in flight beside the
experts' products.

The order of the launches matters, because a communicator carries out its collectives one after the
other: what the products here wait for is launched before the rows, or nothing runs beside them.

Shape letters: T tokens of this rank, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.errors import ConfigError
from hf_sp.model.columns import Entry
from hf_sp.model.lazy import LazyTensor
from hf_sp.torch_private import graph_task, version


@dataclass(eq=False)
class EarlyEntry(Entry):
    """The entry of a block that runs later: what it gathers is there after ``arrive`` only."""

    gathered: Tensor | None = field(default=None, repr=False)
    read: tuple[Tensor, int | None] | None = field(default=None, repr=False)

    def gather(self, x: Tensor) -> Tensor:
        """``[1, tp * T, H]`` in flight."""
        self.read = x, version(x)
        self.gathered = comm.launch_all_gather(x.transpose(0, 1), self.axis)
        return self.gathered.transpose(0, 1)

    def settle(self) -> None:
        """Wait for what was gathered."""
        gathered, self.gathered = self.gathered, None
        if gathered is not None:
            comm.wait(gathered)

    def arrive(self) -> None:
        """Wait for what was gathered, to be used.

        Raises:
            ConfigError: someone has written into the tokens meanwhile.
        """
        self.settle()
        assert self.read is not None
        x, written = self.read
        self.read = None
        if version(x) != written:
            raise ConfigError(
                "the tokens of a sparse block were written into behind its shared expert",
                rule="they are being gathered for it until the tokens travel",
                remedy="write into them before the block, or in a forward pre-hook of its router "
                "or experts, which hf_sp takes into account",
            )

    def close(self) -> None:
        """The block has run, or will not."""
        super().close()
        self.settle()
        self.read = None


@dataclass(eq=False)
class Crossing:
    """The exit of a block in two halves: ``collectives.reducescatter_allgather`` with time between.

    Forward:  ``depart`` launches the reduce-scatter, ``arrive`` waits for it
    Backward: ``arrive``'s leaves the gradient here, ``launch`` starts its all-gather, and
              ``depart``'s waits for it

    Two autograd nodes, joined by an empty tensor. The data goes by this object: what is in flight
    is no tensor that anyone may read, and has another shape than the gradient that it stands for.
    """

    axis: Axis
    token: Tensor | None = field(default=None, repr=False)
    flying: Tensor | None = field(default=None, repr=False)
    gradient: Tensor | None = field(default=None, repr=False)
    task: int = -1

    def depart(self, partial_1SH: Tensor) -> None:
        """Launch the reduction of ``[1, tp * T, H]``."""
        self.token = _Depart.apply(partial_1SH, self)

    def arrive(self) -> Tensor:
        """This rank's ``[T, H]``."""
        token, self.token = self.token, None
        assert token is not None, "nothing has departed"
        return _Arrive.apply(token, self)

    def launch(self) -> None:
        """Start the gather of the output's gradient, if it is here and has not been started."""
        gradient, self.gradient = self.gradient, None
        # One that is left over is of a backward that came to no end.
        if gradient is not None and self.task == graph_task():
            self.flying = comm.launch_all_gather(gradient, self.axis)

    def settle(self) -> None:
        """Wait for what is in flight, which may still land."""
        if self.flying is not None:
            comm.wait(self.flying)

    def landed(self) -> Tensor:
        """What was launched."""
        flying, self.flying = self.flying, None
        assert flying is not None, "nothing was launched"
        return comm.wait(flying)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial_1SH: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.flying = comm.launch_reduce_scatter(partial_1SH.transpose(0, 1), crossing.axis)
        return partial_1SH.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.crossing.launch()
        return ctx.crossing.landed().transpose(0, 1), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, crossing: Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.landed().squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Of an earlier backward that has not come to its end nothing is left.
        ctx.crossing.settle()
        ctx.crossing.flying, ctx.crossing.gradient = None, grads[0].unsqueeze(1)
        ctx.crossing.task = graph_task()
        return grads[0].new_zeros(0), None


def _refuse_gradient(grad: Tensor) -> Tensor:
    raise ConfigError(
        "a shared expert's output that had not been made was given to an autograd Function",
        rule="hf_sp cannot tell how its gradient reaches the shared expert",
        remedy="a forward hook on the shared expert, even one that does nothing: it is computed "
        "when it is called then",
    )


class LazyShared(LazyTensor):
    """Stand-in for the output ``[T, H]`` of a block that may run later; any operation makes it.

    Args:
        full: what the entry gathers, ``[1, tp * T, H]``.
        entry: the block's entry; closed when the block has run.
        run: the block, up to its partial output ``[1, tp * T, H]``; called at most once.
    """

    _run: Callable[[], Tensor] | None
    entry: EarlyEntry
    crossing: Crossing

    @staticmethod
    def __new__(cls, full: Tensor, entry: EarlyEntry, run: Callable[[], Tensor]) -> LazyShared:
        """A tensor without storage."""
        crossing = Crossing(entry.axis)
        shape = (full.shape[1] // entry.axis.size, full.shape[2])
        # Whatever needs a gradient in the block, so does this.
        source = torch.empty(0, requires_grad=torch.is_grad_enabled())
        self = cls._stand_in(shape, full, crossing.arrive, source, _refuse_gradient)
        self._run, self.entry, self.crossing = run, entry, crossing
        return self

    def begin(self) -> None:
        """Run the block and launch its reduction, if that has not been done."""
        run, self._run = self._run, None
        if run is None:
            return
        grad, inference = self._modes
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            try:
                self.entry.arrive()
                self.crossing.depart(run())
            finally:
                self.entry.close()

    def materialize(self) -> Tensor:
        """The output; the same each time."""
        self.begin()
        return super().materialize()
