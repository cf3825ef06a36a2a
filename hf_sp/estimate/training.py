"""What training a whole model needs on one rank, in the steps after the first: counted, not timed.

Must not know what the model is, nor how it was made parallel.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_sp import gloo
from hf_sp.estimate.accounting import CollectiveCount, LiveStorage, Phase, StepAccounting
from hf_sp.estimate.step import own_garbage

PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class Kinds:
    """Bytes at the moment of the peak, by what they are.

    Attributes:
        weights: parameters and buffers.
        gradients: what becomes `.grad`.
        optimizer: its state.
        activations: what the forward has left for the backward.
        communication: outputs of collectives that are neither.
        working: the rest: logits of a chunk, what one operation hands to the next.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    working: int


@dataclass(frozen=True, slots=True)
class TrainingCount:
    """What a step costs once the optimizer has its state.

    Attributes:
        held: bytes of weights and the optimizer's state, which are there all the time.
        gradients: bytes of all gradients.
        kept: bytes of activations that the forward leaves, all of them.
        host: most bytes of activations that wait in the host's memory.
        peaks: most bytes alive at once in each phase, everything included.
        kinds_at: bytes at the peak of each phase.
        collectives: of each phase by kind.
    """

    held: int
    gradients: int
    kept: int
    host: int
    peaks: Mapping[str, int]
    kinds_at: Mapping[str, Kinds]
    collectives: Mapping[str, Mapping[str, CollectiveCount]]

    @property
    def kinds(self) -> Kinds:
        """Bytes at the peak."""
        return self.kinds_at[self.when]

    @property
    def peak(self) -> int:
        """Most bytes alive at once."""
        return max(self.peaks.values())

    @property
    def when(self) -> str:
        """The phase of the peak."""
        return max(PHASES, key=lambda phase: self.peaks[phase])


def count_training(
    build: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module], Tensor],
    optimizer_of: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None,
) -> TrainingCount:
    """Build a model, give its optimizer a state, and count one step of training.

    Args:
        build: makes the model, in train mode.
        loss_of: runs a forward of it and returns the loss.
        optimizer_of: makes the optimizer of the trained parameters; None: no optimizer.
    """
    accounting = StepAccounting()
    with own_garbage(), accounting:
        accounting.phase = "build"
        model = build()
        gc.collect()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizer_of(trained) if optimizer_of is not None else None
        if optimizer is not None:
            _make_state(optimizer, trained)
            gc.collect()
        gloo.finish()
        given = [*model.parameters(), *model.buffers()]
        accounting.book(given)
        held = accounting.live_bytes
        weights = accounting.made(given)

        peaks: dict[str, int] = {}
        alive: dict[str, list[LiveStorage]] = {}

        def close(phase: Phase) -> None:
            peaks[phase], alive[phase] = accounting.peak_bytes, accounting.at_peak()
            accounting.restart_peak()

        accounting.restart_peak()
        accounting.phase = "forward"
        loss = loss_of(model)
        gc.collect()
        gloo.finish()
        activations = [r for r in accounting.alive() if r.phase == "forward"]
        kept = accounting.live_bytes - held
        close("forward")
        accounting.phase = "backward"
        loss.backward()
        del loss
        gradients = accounting.made(p.grad for p in trained if p.grad is not None)
        close("backward")
        accounting.phase = "optimizer"
        if optimizer is not None:
            optimizer.step()
        close("optimizer")
        states = optimizer.state.values() if optimizer is not None else ()
        state = accounting.made(
            x for entry in states for x in entry.values() if isinstance(x, Tensor)
        )
    parts = weights, gradients, state, activations
    kinds = {phase: _kinds(records, *parts) for phase, records in alive.items()}
    found = {str(phase): accounting.collectives(phase) for phase in PHASES}
    whole = sum(record.nbytes for record in gradients)
    return TrainingCount(held, whole, kept, accounting.host_peak, peaks, kinds, found)


def _make_state(optimizer: torch.optim.Optimizer, trained: Iterable[nn.Parameter]) -> None:
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _kinds(
    alive: Iterable[LiveStorage],
    weights: Iterable[LiveStorage],
    gradients: Iterable[LiveStorage],
    state: Iterable[LiveStorage],
    activations: Iterable[LiveStorage],
) -> Kinds:
    sums = dict.fromkeys((f.name for f in dataclasses.fields(Kinds)), 0)
    known = {id(r): "activations" for r in activations}
    known |= {id(r): "weights" for r in weights}
    known |= {id(r): "gradients" for r in gradients}
    known |= {id(r): "optimizer" for r in state}
    for record in alive:
        rest = "communication" if "c10d" in record.op else "working"
        sums[known.get(id(record), rest)] += record.nbytes
    return Kinds(**sums)
