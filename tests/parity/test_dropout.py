"""Dropout of hidden states drops what the unsharded model could have dropped, on any seeds."""

from __future__ import annotations

import pytest
from harness.parity import assert_parity
from harness.pool import pool, run_once

from parity import dropout_jobs
from parity.dropout_jobs import FAMILIES, Case

WAYS = ((True, "none"), (True, "non_reentrant"), (True, "reentrant"), (False, "non_reentrant"))
CASES = tuple(Case(family, *way) for family in FAMILIES for way in WAYS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_the_same_masks(case):
    per_rank = run_once(2, dropout_jobs.drops_all, timeout=120, cases=CASES)
    assert_parity([reports[CASES.index(case)] for reports in per_rank])


def test_in_front_of_a_classifier():
    assert pool(2).run(dropout_jobs.classifier) == [(True, True)] * 2
