"""What the kernel benchmark makes of times: rounds, bars, what time runs out for.

No test looks at a real one. What needs CUDA runs against stand-ins of its calls, which shows that
it fits together, and not what a GPU says.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from hf_sp.kernels import launch as dispatch
from scripts.bench._kernels import cases, clock, contenders, report, runner, sweep
from scripts.bench._kernels.contenders import DIRECT, OURS, Contender, Step


@pytest.fixture(autouse=True)
def _compiled_kernels(monkeypatch):
    """The torch counterparts, whatever the rest of the session was told."""
    monkeypatch.setattr(dispatch, "interpreter", None)


def _case(op: str) -> cases.Case:
    return next(case for case in cases.tiny_cases() if case.op == op and not case.graph)


# --- times, made up -----------------------------------------------------------------------------


class MadeUpClock(clock.Clock):
    """Times as given, by the shape of the results' owner: no CUDA."""

    def __init__(self, times):
        self.device = torch.device("cpu")
        self.given, self.asked = iter(times), 0

    def first(self, step, graph):
        if step.setup is not None:
            step.setup()
        return clock.Ready(step, first_s=0.5), step.run()

    def warm(self, ready, prepare):
        ready.peak_mib, ready.count = 1.0, 2

    def sample(self, ready, prepare=None):
        if prepare is not None:
            prepare()
        ready.step.run()
        self.asked += 1
        ready.samples.append([next(self.given)] * ready.count)
        ready.host += [7.0] * ready.count

    def free(self):
        pass


def _two(name: str = "Liger") -> list[Contender]:
    ours = next(one for one in contenders.contenders("norm") if one.name == OURS)
    only = ("forward",)
    return [
        Contender(OURS, ours.make, ours=True, only=only),
        Contender(name, ours.make, only=only),
    ]


def test_contenders_are_timed_in_turn():
    times = [10.0, 30.0] * 2 + [11.0, 30.0] * 2 + [12.0, 30.0]
    rows = runner.run_case(_case("norm"), _two(), MadeUpClock(times), runner.Budget(900))
    assert [row.median_us for row in rows] == [11.0, 30.0]
    assert rows[0].noise == pytest.approx((11.0 - 10.5) / 11.0)
    assert rows[0].host_us == 7.0
    assert rows[0].gb_s == pytest.approx(4 * 37 * 200 / 11.0 / 1e3)
    assert (rows[0].first_call_s, rows[0].peak_mib) == (0.5, 1.0)


def test_what_time_runs_out_for_is_a_row():
    made_up = MadeUpClock([])
    rows = runner.run_case(_case("norm"), _two(), made_up, runner.Budget(0))
    assert [row.status for row in rows] == ["skipped: out of time"] * 2
    assert made_up.asked == 0


def test_time_that_runs_out_between_rounds_keeps_what_there_is(monkeypatch):
    made_up = MadeUpClock([10.0, 30.0, 11.0])
    budget = runner.Budget(900)
    monkeypatch.setattr(budget, "left", lambda: 900 if made_up.asked < 1 else 0)
    rows = runner.run_case(_case("norm"), _two(), made_up, budget)
    assert [(row.status, row.median_us) for row in rows] == [
        ("ok", 10.0),
        ("skipped: out of time", None),
    ]


def test_a_contender_that_spoils_its_inputs_does_not_spoil_the_others():
    def make(data):
        def run():
            data.inputs[0].data.zero_()
            data.grads[0].zero_()
            return (data.inputs[0].detach(),)

        return {"forward": Step(run)}

    spoiler = Contender("spoils", make, spoils=True, only=("forward",))
    hf = next(one for one in contenders.contenders("norm") if one.name == "HF eager")
    rows = runner.run_case(
        _case("norm"), [spoiler, hf], MadeUpClock([1.0] * 99), runner.Budget(900)
    )
    by_name = {(row.contender, row.step): row for row in rows}
    assert by_name["spoils", "forward"].status == "wrong: y"
    assert (
        by_name["HF eager", "forward"].correct == by_name["HF eager", "backward"].correct == "yes"
    )


def _row(**values) -> runner.Row:
    fields = {"group": "norm", "op": "norm", "step": "forward", "rows": 8192, "n": 4096}
    return runner.Row(**(fields | {"timing": "stream", "contender": OURS} | values))


@pytest.mark.parametrize(
    ("values", "met"),
    [
        ({"gb_s": 3601.0}, "met"),
        ({"gb_s": 3599.0}, "not met"),
        ({"gb_s": 3401.0, "step": "backward"}, "met"),
        ({"gb_s": 3399.0, "step": "backward"}, "not met"),
        ({"gb_s": 3077.0, "op": "ce", "step": "forward+backward"}, "met"),
        ({"gb_s": 3076.0, "op": "ce", "step": "forward+backward"}, "not met"),
        # No share is asked of few rows, of a graph, of swiglu: and nobody to be slower than here.
        ({"gb_s": 1.0, "rows": 1024}, ""),
        ({"gb_s": 1.0, "timing": "graph"}, ""),
        ({"gb_s": 1.0, "op": "swiglu"}, ""),
        ({}, "not measured"),
    ],
)
def test_bars_on_bandwidth(values, met):
    row = _row(**values)
    report.judge([row], [3900.0, 4000.0, 4100.0])
    assert row.met == met


@pytest.mark.parametrize(
    ("times", "noise", "met"),
    [
        ((100.0, 100.0), 0.0, "met"),
        ((100.5, 100.0), 0.0, "not met"),
        ((101.0, 100.0), 0.01, "met"),
        ((103.0, 100.0), 0.5, "not met"),  # noise excuses 2 % at most
        ((100.0, None), 0.0, "not measured"),
    ],
)
def test_bars_on_others(times, noise, met):
    ours = _row(median_us=times[0], noise=noise, timing="graph")
    rival = _row(median_us=times[1], contender="Liger", timing="graph", status="not installed")
    other = _row(median_us=1.0, contender="quack", timing="graph")  # faster, and no bar
    report.judge([ours, rival, other], [4000.0])
    assert ours.met == met
    if times[1] is None:
        assert ours.bar == "not slower than Liger: not installed"


def test_sweep_names_the_best_over_all_shapes():
    def row(rows, name, time):
        return _row(rows=rows, contender=name, median_us=time)

    rows = [row(1024, sweep.TABLE, 12.0), row(1024, "a", 10.0), row(1024, "b", 11.0)]
    rows += [row(32768, sweep.TABLE, 100.0), row(32768, "a", 150.0), row(32768, "b", 101.0)]
    rows += [row(32768, "c", 1.0)]  # failed at the other shape
    rows[-1].median_us = 99.0
    (line,) = sweep.summary(rows)
    assert line.startswith("norm forward N=4096: b, 1.059x of the best of each shape; the table's")


# --- CUDA's calls, made up ----------------------------------------------------------------------


class _Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.recorded = True

    def elapsed_time(self, other):
        assert self.recorded
        assert other.recorded
        return 0.25


class _Graph:
    body: object = None

    def replay(self):
        self.replayed = True


@pytest.mark.parametrize("graph", [False, True])
def test_the_clock_fits_together(monkeypatch, graph):
    """Every line of the clock runs, on a CPU that passes for a GPU."""
    for name, stand_in in {
        "Event": _Event,
        "Stream": lambda device: object(),
        "CUDAGraph": _Graph,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph, stream: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: 2**20,
        "max_memory_allocated": lambda device: 3 * 2**20,
        "reset_peak_memory_stats": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(clock, "_GIB", 2**10)
    timer = clock.Clock(torch.device("cpu"))
    assert timer.bandwidth() == pytest.approx(2 * 2**11 / 250 / 1e3)
    case = cases.Case("norm", "norm", 37, 200, graph)
    rows = runner.run_case(case, contenders.contenders("norm")[:4], timer, runner.Budget(900))
    assert [row.contender for row in rows[:4]] == [OURS, DIRECT, "HF eager", "F.rms_norm"]
    assert {(row.status, row.median_us, row.peak_mib) for row in rows} == {("ok", 250.0, 2.0)}
    assert {row.timing for row in rows} == {"graph" if graph else "stream"}
