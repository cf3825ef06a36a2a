"""A family of the generated table as a case that mutants can be put around."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from harness import tiny
from harness.compare import attempt, whole
from harness.parity import around as in_place
from harness.report import Report, Row

from hf_sp import parallelize
from hf_sp.model.embedding import Rows
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


def rows_of(case: Case) -> Report:
    """Rows of a split embedding as what is around the decoder reads them, and their gradients."""
    report = Report(str(case), dist.get_rank())
    model = tiny.build(case.name)
    want = model.get_input_embeddings().weight
    factor = torch.arange(1.0, want.shape[1] + 1, dtype=want.dtype)
    with in_place(case):
        embedding = parallelize(tiny.build(case.name)).get_input_embeddings()
        rows = Rows(embedding)
        for index in (5, -1):
            report.compare(f"row {index}", rows[index, :], want[index])
            for x in (rows, want):
                (x[index] * factor).sum().backward()
        found = embedding.weight.grad
        got = torch.zeros_like(want) if found is None else whole(found)
        report.compare("gradient", got, want.grad)
    if rows.shape != want.shape:
        report.problems.append(f"shape {rows.shape}")
    return report


def rows_of_all(cases: Iterable[Case]) -> list[Report]:
    """`rows_of` for each case."""
    return [attempt(str(case), lambda case=case: rows_of(case)) for case in cases]
