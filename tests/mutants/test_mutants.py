"""Each deliberate fault turns its check red; without a fault the same case is green.

Two of three such faults leave the loss bit-equal, so this is the proof that the matrix bites. The
mutants of one case and tp run in one job on the persistent ranks, with its healthy twin first.
"""

from __future__ import annotations

import pytest
from harness import tiny
from harness.parity import assert_parity
from harness.pool import run_once
from harness.report import Report

from mutants import MUTANTS, applied

pytestmark = pytest.mark.slow

# A fault must stand out of the rounding by far; the smallest seen is above 1e-3.
CLEARLY_WRONG = 1e-5

# By job, so that the tests of one are neighbours; the jobs of two ranks before those of four.
JOBS: dict[tuple, list[str]] = {}
for _one in sorted(MUTANTS.values(), key=lambda m: (m.tp, m.check.__module__, str(m.case))):
    JOBS.setdefault(_one.job, []).append(_one.name)


def _has_its_target(name: str) -> bool:
    try:
        with applied(name):
            return True
    except AttributeError:
        return False


def _reports(job: tuple, name: str | None) -> list[Report]:
    """Of each rank: the mutant's, or the healthy twin's."""
    tp, check, case = job
    # One that cannot be put in place fails alone.
    names = (None, *(one for one in JOBS[job] if _has_its_target(one)))
    cases = tuple(case.varied(around=one) for one in names)
    index = names.index(name)
    return [reports[index] for reports in run_once(tp, check, timeout=240, cases=cases)]


@pytest.mark.parametrize("name", [name for names in JOBS.values() for name in names])
def test_fault_is_noticed(name):
    with applied(name):
        pass
    reports = _reports(MUTANTS[name].job, name)
    # Numbers, and not a crash of the fault itself.
    assert all(one.rows for one in reports), reports[0].problems
    errors = [one.worst for one in reports]
    assert max(errors) > CLEARLY_WRONG, f"{name} survived: {reports[0].table()}"


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"tp{job[0]}-{job[2]}")
def test_the_same_case_without_fault_is_right(job):
    assert_parity(_reports(job, None), tol=tiny.FLOAT32.get(getattr(job[2], "family", "")))
