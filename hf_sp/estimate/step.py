"""One training step's cost, and the arithmetic on costs. Must not know what the step computes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sp import gloo
from hf_sp.errors import ConfigError
from hf_sp.estimate.accounting import CollectiveCount, StepAccounting


@dataclass(frozen=True, slots=True)
class StepCount:
    """What one forward and backward cost on this rank.

    Attributes:
        alive_bytes: bytes of the storages that the forward made and that are alive when it has
            returned: what autograd saved, the loss, a cache, an output that the caller keeps.
        peak_bytes: most bytes alive at once over forward and backward, gradients included.
            Parameters, buffers, inputs and earlier `.grad` tensors are in neither.
        forward: collectives of the forward by kind.
        backward: collectives of the backward by kind, recomputed forwards included.
    """

    alive_bytes: int
    peak_bytes: int
    forward: Mapping[str, CollectiveCount]
    backward: Mapping[str, CollectiveCount]

    @property
    def collectives(self) -> dict[str, CollectiveCount]:
        """Collectives of forward and backward together, by kind."""
        kinds = dict.fromkeys((*self.forward, *self.backward))
        none = CollectiveCount()
        return {k: self.forward.get(k, none) + self.backward.get(k, none) for k in kinds}

    @property
    def payload_bytes(self) -> int:
        """Payload of all collectives."""
        return sum(count.bytes for count in self.collectives.values())

    @property
    def wire_bytes(self) -> int:
        """Payload of all collectives in all-gather units: an all-reduce counts twice."""
        twice = self.collectives.get("all_reduce", CollectiveCount())
        return self.payload_bytes + twice.bytes


@contextmanager
def own_garbage() -> Iterator[None]:
    """Inside, garbage is collected when we say, and only what is made inside.

    Cycles would be freed whenever Python sees fit. With the collector stopped the peak holds what a
    step can hold. A collection that looks through all that is imported takes a quarter of a second.
    """
    collecting, frozen = gc.isenabled(), gc.get_freeze_count() > 0
    gc.disable()
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
        if collecting:
            gc.enable()


def count_step(forward: Callable[[], Tensor]) -> StepCount:
    """Run a forward and its backward, and count what they cost on this rank.

    Counts, never times: the result is the same on every machine, and the same under a fake process
    group with fake tensors as on real ranks.

    Args:
        forward: runs the forward and returns the loss. A loss of more than one element is given a
            gradient of ones.

    Raises:
        ConfigError: if `forward` returns something else than a tensor, or a loss that needs no
            gradient, so that there is no backward to count.
    """
    accounting = StepAccounting()
    with own_garbage(), accounting:
        loss = forward()
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            needs = getattr(loss, "requires_grad", False)
            raise ConfigError(
                "a step without a loss and its backward cannot be counted",
                where="count_step(forward)",
                got=f"forward() returned {type(loss).__name__}, requires_grad={needs}",
                rule="forward() returns a tensor that depends on a trained parameter",
                remedy="return model(**batch).loss, outside torch.no_grad()",
            )
        # Only what is still reachable counts as alive.
        gc.collect()
        # What a thread of gloo still holds is not the step's.
        gloo.finish()
        alive_bytes = accounting.live_bytes
        accounting.phase = "backward"
        loss.backward(None if loss.numel() == 1 else torch.ones_like(loss))
    return StepCount(
        alive_bytes=alive_bytes,
        peak_bytes=accounting.peak_bytes,
        forward=accounting.collectives("forward"),
        backward=accounting.collectives("backward"),
    )


def per_layer(small: StepCount, large: StepCount, layers: int = 1) -> StepCount:
    """Return the cost of one layer, from two models that differ only in their number of layers.

    Embedding, rotary tables, head and loss are in both and drop out. The larger model has `layers`
    layers more.

    Raises:
        ConfigError: if `layers` is less than one, or a difference is not the same for each layer.
    """

    def share(what: str, difference: int) -> int:
        if layers < 1 or difference % layers:
            raise ConfigError(
                "the layers do not cost the same, or there are none",
                where="per_layer(small, large, layers)",
                got=f"{what} differ by {difference} over layers={layers}",
                rule="layers >= 1, and each costs the same",
                remedy="compare models that differ by one layer",
            )
        return difference // layers

    def shares(phase: str) -> dict[str, CollectiveCount]:
        before, after = getattr(small, phase), getattr(large, phase)
        none, result = CollectiveCount(), {}
        for kind in dict.fromkeys((*before, *after)):
            more = after.get(kind, none) - before.get(kind, none)
            if more != none:
                calls = share(f"{phase} {kind} calls", more.calls)
                result[kind] = CollectiveCount(calls, share(f"{phase} {kind} bytes", more.bytes))
        return result

    return StepCount(
        alive_bytes=share("alive_bytes", large.alive_bytes - small.alive_bytes),
        peak_bytes=share("peak_bytes", large.peak_bytes - small.peak_bytes),
        forward=shares("forward"),
        backward=shares("backward"),
    )
