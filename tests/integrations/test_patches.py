"""Each patch of another package is taken away in turn: what it mends goes wrong as its row says.

The list is the package's own: a patch without a row fails, and so does a row without a patch. A
patch whose removal changes nothing on the newest and on the oldest tested version can go.
"""

from __future__ import annotations

import pytest
import transformers
from harness.pool import run_once

from hf_sp import versions
from integrations import without
from integrations.conftest import TIMEOUT_S
from integrations.differences import differences
from integrations.rows import ROWS, PerRank, Raises
from integrations.tables import entries, tables

ENTRIES = entries()
NEWEST = versions.TESTED["transformers"][1]


def problems(expected, found):
    """Where the outcomes of both ranks are not those of a row."""
    if not isinstance(expected, PerRank):
        expected = PerRank(expected, expected)
    return [
        f"rank {rank}: {problem}"
        for rank, (one, outcome) in enumerate(
            zip((expected.first, expected.second), found, strict=True)
        )
        for problem in _problems(one, outcome)
    ]


def _problems(expected, outcome):
    if isinstance(expected, Raises):
        raised = outcome.get("raised") == expected.type and expected.words in outcome["text"]
        return [] if raised else [f"not {expected}, but {outcome}"]
    if "value" not in outcome:
        return [f"not {expected}, but {outcome}"]
    return differences(expected, outcome["value"])


def test_an_unrelated_crash_is_no_match():
    crash = {"raised": "RuntimeError", "text": "out of memory"}
    assert problems(2, [crash, crash])
    assert problems(Raises("RuntimeError", "got mixed"), [crash, crash])
    assert problems(Raises("ValueError", "out of memory"), [crash, crash])
    assert problems(PerRank(2, 1), [{"value": 2}, {"value": 2}]) == ["rank 1: : 1 2"]
    assert problems(Raises("RuntimeError", "of memory"), [crash, crash]) == []


def test_every_patch_has_a_row():
    assert sorted(ENTRIES) == sorted(ROWS)


def test_every_table_is_found():
    assert sum(len(table.entries) for table in tables().values()) == len(ENTRIES)


def reports(runs):
    """What each rank found, in one job for all rows."""
    return run_once(2, without.on_rank, timeout=TIMEOUT_S, out=str(runs.out))


def test_every_row_has_a_fault_on_one_end():
    idle = [r.patch for r in ROWS.values() if r.wrong == r.right and r.newest in (None, r.right)]
    assert idle == []


@pytest.mark.parametrize("name", sorted(ENTRIES))
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_the_patch_it_goes_wrong(name, runs):
    """And with it, it is right."""
    row, found = ROWS[name], [report[name] for report in reports(runs)]
    assert problems(row.right, [one["right"] for one in found]) == []
    wrong = row.wrong
    if row.newest is not None and transformers.__version__.startswith(NEWEST + "."):
        wrong = row.newest
    assert problems(wrong, [one["wrong"] for one in found]) == []
