"""Runs cases: everyone once and judged, then all in turn, round by round.

Owns the order, the time budget and what becomes a row. Must not know shapes or who computes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from hf_sp.kernels import launch as dispatch
from scripts.bench._kernels import oracle
from scripts.bench._kernels.cases import FLOORS, Case, Data, make_data
from scripts.bench._kernels.clock import Clock, NoClock, Ready
from scripts.bench._kernels.contenders import OURS, Contender, Step, Steps, floor_bytes

ROUNDS = 5
OK, OUT_OF_TIME = "ok", "skipped: out of time"


@dataclass(slots=True)
class Row:
    """One line of the results. What was not measured is None, and empty in the CSV."""

    group: str
    op: str
    step: str
    rows: int
    n: int
    timing: str
    contender: str
    status: str = OK
    path: str = ""
    worst: str = ""
    error: float | None = None
    bound: float | None = None
    correct: str = ""
    median_us: float | None = None
    noise: float | None = None
    host_us: float | None = None
    floor_bytes: int | None = None
    gb_s: float | None = None
    of_copy: float | None = None
    first_call_s: float | None = None
    peak_mib: float | None = None
    bar: str = ""
    met: str = ""

    @property
    def shape(self) -> str:
        """As printed."""
        return f"{self.rows}x{self.n}"


class Budget:
    """The time there is."""

    def __init__(self, seconds: float) -> None:
        """Start it now."""
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()


@dataclass(slots=True)
class _Entry:
    """A contender's step on its way from a first call to a row."""

    row: Row
    contender: Contender
    ready: Ready | None = None


def run_case(
    case: Case, everyone: list[Contender], clock: Clock | NoClock, budget: Budget
) -> list[Row]:
    """Run a case: a row for each contender and step, whatever became of it."""
    # What is compiled for one contender may take that long; started later, it ends too late.
    reserve = 20.0 if clock.times else 0.0
    data: Data | None = None
    entries = []
    for contender in everyone:
        status = contender.missing(clock.device)
        if status is None and budget.left() <= reserve:
            status = OUT_OF_TIME
        if status is None:
            data = data or make_data(case, clock.device)
            entries += _enter(contender, data, clock)
        else:
            entries += _without(case, contender, status)
    if data is not None and clock.times:
        assert isinstance(clock, Clock)
        for step in FLOORS[case.op]:
            _time([one for one in entries if one.row.step == step], data, clock, budget)
    del data
    order = list(FLOORS[case.op])
    entries.sort(key=lambda one: order.index(one.row.step))
    for one in entries:
        _fill(one, case)
        one.ready = None
    clock.free()
    return [one.row for one in entries]


def blank(case: Case, step: str, contender: Contender, status: str = OK) -> Row:
    """A row with nothing measured yet."""
    timing = "graph" if case.graph else "stream"
    return Row(case.group, case.op, step, case.rows, case.n, timing, contender.name, status)


def _without(case: Case, contender: Contender, status: str) -> list[_Entry]:
    steps = contender.steps(case.op)
    return [_Entry(blank(case, step, contender, status), contender) for step in steps]


def _enter(contender: Contender, data: Data, clock: Clock | NoClock) -> list[_Entry]:
    """Call each step of a contender for the first time, and judge the results."""
    if contender.spoils:
        data.keep()
    made: Steps = {}
    entries = []
    with _caught() as failed:
        made = contender.make(data)
    if failed:
        return _without(data.case, contender, failed[0])
    for step in contender.steps(data.case.op):
        entry = _Entry(blank(data.case, step, contender), contender)
        entries.append(entry)
        with _caught() as failed:
            _first(entry, made[step], data, clock)
        if failed:
            entry.row.status, entry.ready = failed[0], None
        if contender.spoils:
            data.restore()
    return entries


def _first(entry: _Entry, step: Step, data: Data, clock: Clock | NoClock) -> None:
    row, contender = entry.row, entry.contender
    _poison(data)
    before = _launches()
    ready, results = clock.first(step, data.case.graph)
    launched = _launches() > before
    if contender.checked:
        if contender.spoils:
            # They may lie where the inputs do, which come back.
            results = tuple(x.detach().clone() for x in results)
            data.restore()
        with torch.no_grad():
            row.worst, row.error, row.bound = oracle.check(data, row.step, results)
        # Not `error > bound`: NaN is wrong.
        row.correct = "yes" if row.error <= row.bound else "NO"
    del results
    if contender.ours:
        row.path = "triton" if launched else "torch"
        if not launched and kernels_run(clock.device):
            # Silent fallbacks are right and slow.
            row.status = "failed: ran in torch, not in Triton"
            return
    if row.correct == "NO":
        row.status = f"wrong: {row.worst}"
        if contender.ours:
            return  # others may round more often than their bound allows, and are timed
    if isinstance(clock, Clock):
        clock.warm(ready, _prepare(contender, data))
    entry.ready = ready


def _time(entries: list[_Entry], data: Data, clock: Clock, budget: Budget) -> None:
    """Time the contenders in turn, so that what changes with time changes for all."""
    live = [one for one in entries if one.ready is not None]
    for _ in range(ROUNDS):
        for one in live:
            if budget.left() <= 0 or one.ready is None:
                continue
            with _caught() as failed:
                clock.sample(one.ready, _prepare(one.contender, data))
            if one.contender.spoils:
                data.restore()
            if failed:
                one.row.status, one.ready = failed[0], None


def _fill(entry: _Entry, case: Case) -> None:
    row, ready = entry.row, entry.ready
    if ready is None:
        return
    row.first_call_s, row.peak_mib = ready.first_s, ready.peak_mib
    if not ready.samples:
        if ready.first_s is not None and row.status == OK:
            row.status = OUT_OF_TIME
        return
    row.median_us = statistics.median(list(chain(*ready.samples)))
    row.host_us = statistics.median(ready.host)
    # The same thing timed twice: smaller differences between contenders say nothing.
    halves = [list(chain(*ready.samples[first::2])) for first in (0, 1)]
    if all(halves):
        one, other = map(statistics.median, halves)
        row.noise = abs(one - other) / row.median_us
    row.floor_bytes = floor_bytes(case, row.step)
    row.gb_s = row.floor_bytes / row.median_us / 1e3


def _prepare(contender: Contender, data: Data) -> Callable[[], None] | None:
    return data.restore if contender.spoils else None


def _poison(data: Data) -> None:
    """Leave NaN where results will be allocated, so that what is not written is not right."""
    for _ in range(2):
        held: list[Tensor] = [torch.full_like(x, float("nan")) for x in data.inputs]
        del held


def _launches() -> int:
    return dispatch.launches.total()


def kernels_run(device: torch.device) -> bool:
    """Whether Triton kernels can run: on a GPU, or in the interpreter."""
    return device.type == "cuda" or dispatch.interpreter is not None


@contextmanager
def _caught() -> Iterator[list[str]]:
    """Make a status of whatever a contender raises: compilers and drivers share no error class."""
    failed: list[str] = []
    try:
        yield failed
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        failed.append(f"failed: {type(error).__name__}: {reason}"[:160])


def wrong(rows: list[Row]) -> list[Row]:
    """Rows of ours that are not right."""
    return [
        row
        for row in rows
        if (row.path and row.correct == "NO")
        or (row.contender.startswith(OURS) and row.status.startswith("failed"))
    ]
