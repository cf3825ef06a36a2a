"""family x tp x sp x checkpointing x accumulation: every gradient against the unsharded model.

One pytest id a cell; the cells of a (family, tp, dtype) are run in one job on the persistent ranks,
at the first of them. Two optimizer steps each, with clipping active. See harness/parity.py for
what is compared, and harness/report.py for how closely.
"""

from __future__ import annotations

import itertools

import pytest
from harness import tiny
from harness.parity import Case, assert_parity
from harness.pool import run_once

TPS = (2, 4)


def _cells(family: str, dtype: str) -> list[Case]:
    if dtype == "float32":
        # The dtype changes the arithmetic, not the collectives.
        return [Case(family, True, dtype, "none", accum=1)]
    # SGD with one micro-batch, AdamW with three: both optimizers meet every family.
    return [
        Case(family, sp, dtype, checkpoint, accum, "sgd" if accum == 1 else "adamw")
        for sp, checkpoint, accum in itertools.product(
            (True, False), ("none", "non_reentrant", "reentrant"), (1, 3)
        )
    ]


CELLS = [
    pytest.param(tp, case, id=f"tp{tp}-{case}")
    for family, tp, dtype in itertools.product(tiny.FAMILIES, TPS, ("float64", "float32"))
    for case in _cells(family, dtype)
]


@pytest.mark.parametrize(("tp", "case"), CELLS)
def test_training_matches_the_unsharded_model(tp, case):
    cases = tuple(_cells(case.family, case.dtype))
    per_rank = run_once(tp, "harness.parity:train_all", timeout=180, cases=cases)
    assert_parity([reports[cases.index(case)] for reports in per_rank])
