"""A small set of rows in which every two values of two factors meet (2-way covering array).

Owns: the choice of rows. Must not know: what the factors mean.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = frozenset[tuple[str, Any]]


def _always(row: Row) -> bool:
    return True


def pairs_of(row: Row) -> set[Pair]:
    """The pairs of (factor, value) that meet in a row."""
    return {frozenset(two) for two in itertools.combinations(row.items(), 2)}


def possible_pairs(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = _always
) -> set[Pair]:
    """Every pair that some allowed row of the full product has."""
    return set().union(*(pairs_of(row) for row in _product(factors) if allowed(row)))


def pairwise(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Row], bool] = _always
) -> list[Row]:
    """Rows of the full product that together have every possible pair, in the product's order.

    Greedy and deterministic: the row that meets most pairs not met yet, the first of equals, until
    none is left. `allowed` says which rows can be run at all.
    """
    rows = [row for row in _product(factors) if allowed(row)]
    pairs = [pairs_of(row) for row in rows]
    missing = set().union(*pairs)
    chosen = set()
    while missing:
        best = max(range(len(rows)), key=lambda index: len(pairs[index] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [rows[index] for index in sorted(chosen)]


def _product(factors: Mapping[str, Sequence[Any]]) -> list[Row]:
    return [
        dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())
    ]
