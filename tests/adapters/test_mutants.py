"""Each deliberate fault of the adapters turns their parity red; without it the case is green."""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness.parity import assert_parity
from harness.pool import run_once

from adapters.faults import FAULTS

# A fault must stand out of the rounding by far.
CLEARLY_WRONG = 1e-5

HEALTHY = tuple(
    {
        str(f.lora.config) + f.lora.case.family + str(f.lora.case.sp): replace(
            f.lora, case=replace(f.lora.case, around=None)
        )
        for f in FAULTS.values()
    }.values()
)


def _reports(world, cases, index):
    return [reports[index] for reports in run_once(world, "adapters.jobs:train_all", cases=cases)]


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_fault_is_noticed(name):
    names = sorted(FAULTS)
    cases = tuple(FAULTS[n].lora for n in names)
    reports = _reports(2, cases, names.index(name))
    # Numbers, and not a crash of the fault itself.
    assert all(one.rows for one in reports), reports[0].problems
    worst = max(one.worst for one in reports)
    assert worst > CLEARLY_WRONG, f"{name} survived: {reports[0].table()}"


@pytest.mark.parametrize("lora", HEALTHY, ids=str)
def test_the_same_case_without_fault_is_right(lora):
    assert_parity(_reports(2, HEALTHY, HEALTHY.index(lora)))
