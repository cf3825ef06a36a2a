"""A CPU on which collectives are in flight until they are waited for, as on a GPU.

gloo is waited for at once (``collectives._launch``), so that nothing would show a read before the
wait, or a wait that is missing. Here what was launched holds NaN until ``comm.wait`` is called on
it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hf_sp.comm import collectives as comm

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


@dataclass
class Flight:
    """Collectives in flight, by the memory of their result."""

    flying: dict[int, tuple[str, Tensor, Tensor]] = field(default_factory=dict)


@contextlib.contextmanager
def in_flight(*, finish: bool = True) -> Iterator[Flight]:
    """Launches return NaN until their wait; what is never waited for is an error (``finish``)."""
    flight = Flight()
    wait = comm.wait

    def launch(kind: str, right: Any) -> Any:
        def launched(x: Tensor, *args: Any) -> Tensor:
            result = right(x, *args)
            empty = torch.full_like(result, torch.nan if result.is_floating_point() else -1)
            what = f"{kind} {tuple(x.shape)}"
            flight.flying[empty.untyped_storage()._cdata] = what, empty, result
            return empty

        return launched

    def landed(x: Tensor) -> Tensor:
        what, empty, result = flight.flying.pop(x.untyped_storage()._cdata, ("", x, x))
        if what:
            # Not as a write: it does not count as one where a collective makes it.
            empty.data.copy_(result)
        return wait(x)

    with contextlib.ExitStack() as stack:
        for kind in KINDS:
            name = f"launch_{kind}"
            patched = launch(kind, getattr(comm, name))
            stack.enter_context(mock.patch.object(comm, name, patched))
        stack.enter_context(mock.patch.object(comm, "wait", landed))
        yield flight
    if finish:
        assert not flight.flying, [what for what, *_ in flight.flying.values()]
