"""The table of sparse layers' costs: the committed one is what the script makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.bench import moe_cost, step_cost

COMMITTED = (Path(__file__).resolve().parents[2] / "scripts/bench/results/moe_cost.md").read_text()


def _line(row: tuple[str, ...]) -> str:
    return f"| {' | '.join(row)} |"


@pytest.mark.parametrize("case", [moe_cost.CASES[0], moe_cost.CASES[-1]], ids=str)
def test_counted_rows(case):
    for row in moe_cost.rows(*case):
        assert _line(row) in COMMITTED


@pytest.mark.parametrize("case", moe_cost.GROUPS, ids=str)
def test_closed_forms(case):
    rows = moe_cost.groups(*case)
    assert len(rows) == 3
    for row in rows:
        assert _line(row) in COMMITTED


@pytest.mark.parametrize("case", step_cost.SPARSE_CASES, ids=str)
def test_rows_of_the_step_cost(case):
    """A layer keeps what the closed form says: to the counts of the load, and where rows end."""
    committed = (Path(step_cost.RESULTS) / "step_cost.md").read_text()
    experts = moe_cost.SHAPES[case[0]].experts
    for row in step_cost.measure_sparse(case):
        assert _line(step_cost.cells(row)) in committed
        # Where the rows of the experts on this rank end.
        local = experts // row.tp if row.layout.endswith("ep=tp") else experts
        constant = 8 * (experts + 1) + 4 * local
        assert row.alive_bytes == row.formula * row.seq + constant
