"""A row of the test that takes patches away: what is right with it, and what goes wrong without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Raises:
    """The call ends in this exception, whose text has these words."""

    type: str
    words: str


@dataclass(frozen=True)
class PerRank:
    """Ranks differ in what they find."""

    first: Any
    second: Any


@dataclass(frozen=True)
class Row:
    """One patch.

    Args:
        patch: its name, ``Owner.attribute``.
        probe: what is done on every rank; returns a value that can be compared.
        right: the value with the patch, or what it raises.
        wrong: the same without the patch.
        newest: likewise, where the newest tested transformers does other than the oldest.
    """

    patch: str
    probe: Callable[..., Any]
    right: Any
    wrong: Any
    newest: Any = None


ROWS: dict[str, Row] = {}


def row(patch, *, right, wrong, newest=None):
    """Decorator: the probe of a patch."""

    def register(probe):
        assert patch not in ROWS, f"{patch} has a row"
        ROWS[patch] = Row(patch, probe, right, wrong, newest)
        return probe

    return register
