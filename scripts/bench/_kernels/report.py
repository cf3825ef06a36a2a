"""What is said of the rows: bars, CSV, markdown, a table in the terminal.

Owns the bars and every word of the results. Must not run anything.
"""

from __future__ import annotations

import csv
import importlib.metadata
import platform
from collections.abc import Iterable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from scripts.bench._kernels.contenders import OURS, RIVALS
from scripts.bench._kernels.runner import Row

# Shares of the copy bandwidth of the same run, from this many rows on.
SHARES, SHARES_FROM = {"forward": 0.90, "backward": 0.85}, 8192
# Times the time that a copy would take for the floor's bytes.
LOSS_OVER_FLOOR = 1.3
# Differences below what the same thing differs by when timed twice are none; nor is that an excuse.
NOISE_LIMIT = 0.02
NOT_MEASURED = "not measured"


def environment(device: torch.device, copy_gb_s: list[float]) -> dict[str, str]:
    """GPU, versions, date: written beside each row."""

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "-"

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none (dry run)"
    packages = ("triton", "transformers", "liger-kernel", "quack-kernels")
    return {
        "copy_gb_s": f"{sorted(copy_gb_s)[len(copy_gb_s) // 2]:.0f}" if copy_gb_s else "",
        "gpu": gpu,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "-",
        **{package.replace("-", "_"): version(package) for package in packages},
    }


def judge(rows: list[Row], copy_gb_s: list[float]) -> None:
    """Fill in the share of the copy bandwidth, and the bars of ours.

    Args:
        rows: of a run; changed.
        copy_gb_s: measured in the same run, in GB/s; the median counts. Empty if nothing was.
    """
    copy = sorted(copy_gb_s)[len(copy_gb_s) // 2] if copy_gb_s else None
    for row in rows:
        row.of_copy = None if copy is None or row.gb_s is None else row.gb_s / copy
    for row in rows:
        if row.contender == OURS:
            same = (row.group, row.op, row.step, row.shape)
            peers = [r for r in rows if (r.group, r.op, r.step, r.shape) == same]
            row.bar, row.met = _bars(row, [r for r in peers if r.contender in RIVALS])


def _bars(row: Row, rivals: list[Row]) -> tuple[str, str]:
    """What ours has to reach here, with what it did reach; and whether that is enough."""
    bars, verdicts = [], []
    for text, held in [_share(row), _floor(row), *(_against(row, one) for one in rivals)]:
        if text:
            bars.append(text)
            verdicts.append(held)
    told = [held for held in verdicts if held is not None]
    if not told:
        return "; ".join(bars), NOT_MEASURED if bars else ""
    return "; ".join(bars), "met" if all(told) else "not met"


def _share(row: Row) -> tuple[str, bool | None]:
    timed_alone = row.timing == "stream" and row.rows >= SHARES_FROM
    if row.op != "norm" or row.step not in SHARES or not timed_alone:
        return "", None
    least = SHARES[row.step]
    if row.of_copy is None:
        return f">= {least:.0%} of copy", None
    return f">= {least:.0%} of copy: {row.of_copy:.1%}", row.of_copy >= least


def _floor(row: Row) -> tuple[str, bool | None]:
    if row.op != "ce":
        return "", None
    text = f"<= {LOSS_OVER_FLOOR}x of the floor"
    if row.of_copy is None:
        return text, None
    return f"{text}: {1 / row.of_copy:.2f}x", row.of_copy * LOSS_OVER_FLOOR >= 1


def _against(row: Row, rival: Row) -> tuple[str, bool | None]:
    text = f"not slower than {rival.contender}"
    if rival.median_us is None:
        return f"{text}: {rival.status}" if rival.status != "ok" else text, None
    if row.median_us is None:
        return text, None
    ratio = row.median_us / rival.median_us
    allowed = 1 + min(NOISE_LIMIT, (row.noise or 0.0) + (rival.noise or 0.0))
    return f"{text}: {ratio:.2f}x its time", ratio <= allowed


def write_csv(rows: list[Row], about: dict[str, str], path: Path) -> None:
    """Write the rows, each with the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [field.name for field in fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *about], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            found = {key: _number(value) for key, value in asdict(row).items()}
            writer.writerow({**found, **about})


def _number(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


HEADER = ("step", "shape", "timing", "who", "status", "error / bound", "us", "GB/s", "of copy")
HEADER += ("host us", "first call s", "peak MiB", "bar", "")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of HEADER."""

    def told(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    error = "-" if row.error is None else f"{row.error:.1e} / {row.bound:.1e}"
    status = f"{row.status} ({row.path})" if row.path else row.status
    share, spread = told(row.of_copy, ".1%"), told(row.noise, ".1%")
    time = NOT_MEASURED if row.median_us is None else f"{row.median_us:.1f} ±{spread}"
    numbers = (time, told(row.gb_s, ".0f"), share, told(row.host_us, ".0f"))
    rest = (told(row.first_call_s, ".2f"), told(row.peak_mib, ".0f"), row.bar, row.met)
    return (
        f"{row.op} {row.step}",
        row.shape,
        row.timing,
        row.contender,
        status,
        error,
        *numbers,
        *rest,
    )


NOTES = """\
bf16 on one GPU. `us`: median of CUDA events around one call, the contenders in turn over five
rounds, the L2 emptied by reading 2 GiB before each call; ± is what the medians of odd and even
rounds differ by. `stream`: called as a user would, with Python ahead of the device; `graph`: a
replay of a CUDA graph. `GB/s`: the bytes that the step cannot do without, over the time, whatever
was moved in fact; `of copy`: that over the bandwidth of a 2 GiB copy in the same run. `host`: what
the call takes Python, which decides where kernels are short. `first call`: wall time, compilation
included (caches on disk may shorten it). `peak`: memory above what was there before the call.
`error`: largest distance to float64 relative to the scale that its bound is derived for
(`scripts/bench/_kernels/oracle.py`). `recompute`: the backward that makes the product again.
`copy of as many bytes`: a copy at that size, which no kernel beats.
"""


def write_markdown(
    rows: list[Row], about: dict[str, str], path: Path, title: str, command: str, more: list[str]
) -> None:
    """Write the rows as tables, a group each.

    Args:
        rows: the rows.
        about: of ``environment``.
        path: where to.
        title: of the page.
        command: what made it.
        more: lines to follow the notes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {title}", "", NOTES, ", ".join(f"{k} {v}" for k, v in about.items()) + "."]
    lines += [f"Made by `{command}`.", "", *(f"- {line}" for line in more)]
    for group in dict.fromkeys(row.group for row in rows):
        lines += [
            "",
            f"## {group}",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
        ]
        for row in rows:
            if row.group == group:
                escaped = (cell.replace("|", "\\|") for cell in cells(row))
                lines.append("| " + " | ".join(escaped) + " |")
    path.write_text("\n".join(lines) + "\n")


def table(rows: Iterable[Row], title: str) -> Table:
    """The rows for a terminal, without what only the files have room for."""
    found = Table(*HEADER[:-4], title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    before: Row | None = None
    for row in rows:
        if before is not None and (before.op, before.shape) != (row.op, row.shape):
            found.add_section()
        found.add_row(*cells(row)[:-4])
        before = row
    return found


def bars(rows: Iterable[Row]) -> list[str]:
    """A line for each row that has to reach something, those that do not last."""
    found = sorted((row for row in rows if row.bar), key=lambda row: row.met == "not met")
    return [
        f"{row.op} {row.step} {row.shape} ({row.timing}): {row.met}: {row.bar}" for row in found
    ]
