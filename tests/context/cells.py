"""Cells of a parity matrix on two and on four ranks, which a job of each world trains together."""

from __future__ import annotations

import pytest
from harness import tiny
from harness.parity import Case, assert_parity, train_all
from harness.pool import run_once


def in_worlds(two: tuple[Case, ...], four: tuple[Case, ...]) -> pytest.MarkDecorator:
    """Parametrizes ``world``, ``cases`` and ``index``, which ``assert_cell`` takes."""
    cells = [(n, cases, i) for n, cases in ((2, two), (4, four)) for i in range(len(cases))]
    names = [f"world{n}-{cases[i]}" for n, cases, i in cells]
    return pytest.mark.parametrize(("world", "cases", "index"), cells, ids=names)


def assert_cell(world: int, cases: tuple[Case, ...], index: int) -> None:
    """Every rank's report of the case, to what its family's float32 operations allow."""
    per_rank = run_once(world, train_all, timeout=240, cases=cases)
    tolerance = tiny.FLOAT32.get(cases[index].family)
    assert_parity([reports[index] for reports in per_rank], tol=tolerance)
