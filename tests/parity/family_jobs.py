"""A family of the generated table as a case that mutants can be put around."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch.distributed as dist
from harness.compare import attempt
from harness.parity import around as in_place
from harness.report import Report, Row

from scripts._families.compare import check


@dataclass(frozen=True)
class Case:
    """A name of scripts/families.py; `around` names a mutant."""

    name: str
    around: str | None = None

    def varied(self, *, around: str | None = None, **_: object) -> Case:
        return replace(self, around=around)


def table(case: Case) -> Report:
    """What the table has of it; transformers' float32 inside of a float64 model is its limit."""
    report = Report(str(case), dist.get_rank(), "float32")
    with in_place(case):
        found = check(case.name)
    report.rows += [Row(kind, error, 1.0) for kind, error in found["errors"].items()]
    return report


def tables(cases: Iterable[Case]) -> list[Report]:
    """`table` for each case."""
    return [attempt(str(case), lambda case=case: table(case)) for case in cases]
