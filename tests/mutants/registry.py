"""The one registry of mutants: deliberate faults, and what must notice each.

A mutant replaces functions of hf_sp for the life of the parallel model. It keeps shapes and the
order of collectives, so that nothing fails but the numbers: these are the faults that train
silently wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

from harness.parity import Case, train_all

# (owner, attribute, what it is replaced by)
Patch = tuple[Any, str, Any]
Patches = Callable[[], list[Patch]]


@dataclass(frozen=True)
class Mutant:
    """What is replaced, and where it must show.

    `check` runs cases on the ranks, a report each; `case` is one that it knows, on `tp` ranks.
    """

    name: str
    patches: Patches
    case: Any
    tp: int
    check: Callable

    @property
    def job(self) -> tuple[int, Callable, Any]:
        """Mutants of one job have one unsharded run and one healthy twin."""
        return self.tp, self.check, self.case


MUTANTS: dict[str, Mutant] = {}


def register(
    name: str, patches: Patches, case: Any = None, tp: int = 2, check: Callable = train_all
) -> None:
    """Add a mutant. Its case is trained for one step: a wrong gradient shows in the first."""
    assert name not in MUTANTS, f"two mutants {name}"
    case = Case("llama_bias") if case is None else case
    MUTANTS[name] = Mutant(name, patches, case.varied(steps=1), tp, check)


def mutant(case: Any = None, tp: int = 2, check: Callable = train_all) -> Callable:
    """Register the decorated function, which returns the patches, under its name."""

    def decorate(patches: Patches) -> Patches:
        register(patches.__name__, patches, case, tp, check)
        return patches

    return decorate


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    """The mutant of that name in place."""
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in MUTANTS[name].patches():
            stack.enter_context(mock.patch.object(owner, attribute, value))
        yield
