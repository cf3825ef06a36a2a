"""family x tp x sp x checkpointing x accumulation x optimizer against the unsharded model.

Not the full product but a pairwise design: every family at every tp meets both values of sp, all
kinds of checkpointing, both accumulations and both optimizers, and every two of those meet. A fault
that needs three of them at once would be one of hf_sp's branches on three of them; it has none.

One pytest id a cell; the cells of a family, tp and dtype are run in one job on the persistent
ranks, at the first of them. Two optimizer steps each, with clipping active. See harness/parity.py
for what is compared, and harness/report.py for how closely.
"""

from __future__ import annotations

import itertools

import pytest
from harness import tiny
from harness.pairwise import pairs_of, pairwise, possible_pairs
from harness.parity import Case, assert_parity, train_all
from harness.pool import run_once

TPS = (2, 4)
FACTORS = {
    # One factor: every family at every tp meets the values of all others.
    "model": tuple(itertools.product(tiny.FAMILIES, TPS)),
    "sp": (True, False),
    "checkpoint": ("none", "non_reentrant", "reentrant"),
    "accum": (1, 3),
    "optimizer": ("sgd", "adamw"),
}
ROWS = pairwise(FACTORS)


def _cells(family: str, tp: int, dtype: str) -> tuple[Case, ...]:
    if dtype == "float32":
        # The dtype changes the arithmetic, not the collectives.
        return (Case(family, dtype=dtype),)
    return tuple(
        Case(family, row["sp"], dtype, row["checkpoint"], row["accum"], row["optimizer"])
        for row in ROWS
        if row["model"] == (family, tp)
    )


KINDS = [*itertools.product(TPS, tiny.FAMILIES, ["float64"])]
KINDS += [(2, family, "float32") for family in tiny.FAMILIES]
CELLS = [
    pytest.param(tp, case, id=f"tp{tp}-{case}", marks=[pytest.mark.slow] if tp == 4 else [])
    for tp, family, dtype in KINDS
    for case in _cells(family, tp, dtype)
]


@pytest.mark.parametrize(("tp", "case"), CELLS)
def test_training_matches_the_unsharded_model(tp, case):
    cases = _cells(case.family, tp, case.dtype)
    per_rank = run_once(tp, train_all, timeout=180, cases=cases)
    assert_parity([reports[cases.index(case)] for reports in per_rank])


def test_every_pair_is_in_the_matrix():
    found = set().union(*(pairs_of(row) for row in ROWS))
    assert found == possible_pairs(FACTORS)
    assert len(CELLS) == len(ROWS) + len(tiny.FAMILIES)
