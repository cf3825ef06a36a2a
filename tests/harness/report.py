"""What a parity test asks of the reports of its ranks. Tolerances: hf_sp/proof/report.py."""

from __future__ import annotations

from collections.abc import Sequence

from hf_sp.proof.report import FLOOR, TOLERANCE, Report, Row, floors, size

__all__ = ["FLOOR", "TOLERANCE", "Report", "Row", "assert_parity", "floors", "size"]


def assert_parity(reports: Report | Sequence[Report], tol: float | None = None) -> None:
    """Fail with the worst five errors of each rank if one is above `tol` or a contract is broken.

    `tol` is that of the report's dtype unless given.
    """
    reports = [reports] if isinstance(reports, Report) else list(reports)
    lines = []
    for report in reports:
        limit = TOLERANCE[report.dtype] if tol is None else tol
        if not report.rows:
            lines.append(f"{report.name} (rank {report.rank}): nothing was compared")
        if report.problems:
            lines += [
                f"{report.name} (rank {report.rank}): {problem}" for problem in report.problems
            ]
        if not report.worst <= limit:
            lines.append(f"above {limit:g}: {report.table()}")
    if lines:
        raise AssertionError("\n".join(lines))
