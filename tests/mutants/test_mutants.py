"""Each deliberate fault turns the parity check red; without a fault the same cases are green.

Two of three such faults leave the loss bit-equal, so this is the proof that the matrix bites.
"""

from __future__ import annotations

import dataclasses

import pytest
from harness.parity import assert_parity
from harness.pool import pool

from mutants.faults import FAULTS

# A fault must stand out of the rounding by far; the smallest seen is above 1e-3.
CLEARLY_WRONG = 1e-5

HEALTHY = sorted({(f.tp, f.case) for f in FAULTS.values()}, key=str)


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_fault_is_noticed(name):
    fault = FAULTS[name]
    case = dataclasses.replace(fault.case, around=f"mutants.faults:{name}")
    reports = [one for (one,) in pool(fault.tp).run("harness.parity:train_all", cases=[case])]
    # Numbers, and not a crash of the fault itself.
    assert all(one.rows for one in reports), reports[0].problems
    errors = [one.worst for one in reports]
    assert max(errors) > CLEARLY_WRONG, f"{name} survived: {reports[0].table()}"


@pytest.mark.parametrize(("tp", "case"), HEALTHY, ids=lambda x: str(x))
def test_the_same_case_without_fault_is_right(tp, case):
    assert_parity(pool(tp).run("harness.parity:train", case=case))
