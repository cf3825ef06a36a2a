"""Inputs of checkpointed layers wait in the host's memory until backward needs them.

A layer's checkpoint is called through ``HostInputs``, whose hooks see what that saves: the layer's
inputs. What the layer itself saves has the checkpoint's own hooks.

On a GPU the copies run on a stream of their own. Out: beside the layer, whose input the next
layer's waits to be free of. Back: while a layer runs again, that of the layer before it. The last
layer's is still there as backward begins, and is not copied back. Not measured on a GPU.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, library
from torch.autograd.graph import saved_tensors_hooks

from hf_sp.errors import ConfigError


@library.custom_op("hf_sp::to_host", mutates_args=())
def to_host(x: Tensor) -> Tensor:
    """A copy in the host's memory, pinned for a GPU, which the host does not wait for."""
    host = torch.empty_like(x, device="cpu", pin_memory=not x.is_cpu)
    return host.copy_(x, non_blocking=True)


@to_host.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu")


class _Lane:
    """The stream that a device's copies run on; on a CPU there is none, and nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = None if device.type == "cpu" else torch.Stream(device)

    def after_compute(self) -> AbstractContextManager[Any]:
        """Copies in it start when what was launched so far has run; memory is the lane's own."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        return self.stream

    def mark(self) -> Any:
        """What ``wait`` waits for."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, mark: Any) -> None:
        """Let what is launched from now on start behind the mark."""
        if mark is not None:
            torch.accelerator.current_stream(self.device).wait_event(mark)


_lane = functools.cache(_Lane)


class _Input:
    """One layer's input, on its way; held by the autograd graph."""

    def __init__(self, x: Tensor, before: _Input | None) -> None:
        self.before = None if before is None else weakref.ref(before)
        self.lane = _lane(x.device)
        self.leaving: Tensor | None = x
        self.coming: Tensor | None = None
        with self.lane.after_compute():
            self.host = to_host(x)
            self.mark = self.lane.mark()

    def settle(self) -> None:
        """Free its memory on the device, for what is launched from now on."""
        self.lane.wait(self.mark)
        self.leaving = None

    def fetch(self) -> None:
        """Start the copy back."""
        if self.leaving is not None or self.coming is not None:
            return
        with self.lane.after_compute():
            # Of the lane's memory: it is written again only behind what has read it.
            self.coming = torch.empty_like(self.host, device=self.lane.device)
            self.coming.copy_(self.host, non_blocking=True)
            self.mark = self.lane.mark()

    def take(self) -> Tensor:
        """The input on its device; the one before it is on its way."""
        self.fetch()
        x = self.leaving
        if x is None:
            self.lane.wait(self.mark)
            x, self.coming = self.coming, None
        assert x is not None
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return x


class HostInputs:
    """Calls a model's checkpoints; the inputs that they save go to the host."""

    def __init__(self) -> None:
        self.latest: weakref.ref[_Input] | None = None
        self.count = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> HostInputs:
        return HostInputs()

    def call(self, checkpoint: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
        """The checkpoint of a layer's forward.

        Raises:
            ConfigError: it has saved nothing that the hooks could see.
        """
        before = self.count
        with saved_tensors_hooks(self._pack, _unpack):
            result = checkpoint(function, *args, **kwargs)
        records = any(isinstance(x, Tensor) and x.requires_grad for x in args)
        if records and torch.is_grad_enabled() and self.count == before:
            raise ConfigError(
                "a layer's checkpoint did not show hf_sp what it saves",
                got=f"{getattr(checkpoint, 'func', checkpoint)}",
                rule="offload=True moves the inputs that torch's checkpoint saves",
                remedy="leave transformers' own offload out of the checkpointing arguments, "
                "or parallelize(..., offload=False)",
            )
        return result

    def _pack(self, x: Tensor) -> Any:
        # Not a mask, and no state of a generator.
        if not x.is_floating_point():
            return x
        before = None if self.latest is None else self.latest()
        if before is not None:
            before.settle()
        kept = _Input(x, before)
        self.latest, self.count = weakref.ref(kept), self.count + 1
        return kept


def _unpack(kept: Any) -> Tensor:
    return kept.take() if isinstance(kept, _Input) else kept
