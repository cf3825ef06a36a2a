"""The sweep behind the fixed launch settings: our launchers with settings that are not the table's.

Owns the settings tried and the summary. Must not change the table: a person reads the summary, and
writes numbers into ``hf_sp/kernels/table.py`` and ``cross_entropy_triton.py``.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import replace

from hf_sp.kernels import table
from hf_sp.kernels.table import LaunchConfig
from scripts.bench._kernels.cases import EPS, FLOORS, Case, Data
from scripts.bench._kernels.clock import Clock, NoClock
from scripts.bench._kernels.contenders import (
    OURS,
    Contender,
    Results,
    Step,
    Steps,
    our_loss_kernels,
)
from scripts.bench._kernels.runner import Budget, Row, blank, kernels_run, run_case

TABLE = f"{OURS}, the table's"


def sweep_cases() -> list[Case]:
    """Shapes that decide: wide ones for bandwidth, a rank's shard for launches."""
    shapes = [("norm", rows, n) for n in (4096, 8192, 5120) for rows in (32768, 1024)]
    shapes += [("qnorm", 327680, 128), ("qnorm", 40960, 128)]
    shapes += [("ce", 8192, 131072), ("ce", 8192, 18992)]
    shapes += [("swiglu", 8192, 14336), ("swiglu", 8192, 3584)]
    ops = {"qnorm": "norm"}
    return [Case(group, ops.get(group, group), rows, n, rows < 8192) for group, rows, n in shapes]


def settings(case: Case, step: str, few: bool = False) -> list[LaunchConfig]:
    """What is tried for a kernel.

    Args:
        case: operation and shape.
        step: which of its kernels.
        few: two only, to see that it works.
    """
    narrow = case.n <= 1024
    if case.op == "norm" and step == "forward":
        rows = (8, 16, 32, 64) if narrow else (1, 2, 4)
        found = [LaunchConfig(w, r) for w, r in itertools.product((4, 8, 16), rows)]
    elif case.op == "norm":
        warps, rows, per_sm = (4, 8, 16), (1,), (1, 2, 3, 4)
        if narrow:
            warps, rows, per_sm = (4, 8), (8, 16, 32), (4, 8, 16)
        grid = itertools.product(warps, rows, (1, 2, 3), per_sm)
        found = [LaunchConfig(w, r, stages, p) for w, r, stages, p in grid]
    elif case.op == "swiglu":
        blocks = itertools.product((4, 8), (512, 1024, 2048, 4096))
        found = [LaunchConfig(w, block=block) for w, block in blocks]
    else:
        blocks = itertools.product((4, 8, 16), (1024, 2048, 4096, 8192))
        found = [LaunchConfig(w, block=block) for w, block in blocks]
    return found[:: len(found) // 2] if few else found


def _spell(case: Case, step: str, config: LaunchConfig) -> str:
    if case.op in ("swiglu", "ce"):
        return f"warps={config.warps} block={config.block}"
    loop = f" stages={config.stages} per_sm={config.per_sm}" if step == "backward" else ""
    return f"warps={config.warps} rows={config.rows}{loop}"


def present(case: Case, step: str) -> LaunchConfig:
    """What the kernels are launched with now."""
    if case.op == "swiglu":
        return table.SWIGLU
    if case.op == "ce":
        from hf_sp.kernels import cross_entropy_triton as kernels

        return kernels.STATISTICS if step == "statistics" else kernels.GRADIENT
    return table.norm_forward(case.n) if step == "forward" else table.norm_backward(case.n)


def sweep_contenders(case: Case, step: str, few: bool = False) -> list[Contender]:
    """A contender for each setting of one kernel, the table's first."""

    def contender(name: str, config: LaunchConfig | None) -> Contender:
        def make(data: Data) -> Steps:
            return {step: _step(data, step, config)}

        return Contender(name, make, ours=True, only=(step,))

    found = [contender(_spell(case, step, one), one) for one in settings(case, step, few)]
    return [contender(TABLE, None), *found]


def steps(case: Case) -> list[str]:
    """The steps that are one kernel each."""
    return [step for step in FLOORS[case.op] if step != "forward+backward"]


def _step(data: Data, step: str, config: LaunchConfig | None) -> Step:
    """One launch with a setting, past the dispatch, which knows of the table only."""
    if data.case.op == "ce":
        return our_loss_kernels(data, **{step: config})[step]
    from hf_sp.kernels import norm_triton, swiglu_triton

    inputs, grads = [x.detach() for x in data.inputs], data.grads
    if data.case.op == "swiglu":
        gate, up = inputs
        if step == "forward":
            return Step(lambda: (swiglu_triton.swiglu(gate, up, config=config),))
        product = step == "recompute"

        def swiglu_backward() -> Results:
            got = swiglu_triton.swiglu_backward(grads[0], gate, up, product=product, config=config)
            return tuple(x for x in got if x is not None)

        return Step(swiglu_backward)
    x, w = inputs
    rstd: list = []

    def forward(use: LaunchConfig | None = config) -> Results:
        return norm_triton.rms_norm(x, w, EPS, 0.0, "llama", config=use)

    def setup() -> None:
        rstd[:] = forward(None)[1:]

    def backward() -> Results:
        got = norm_triton.rms_norm_backward(grads[0], x, *rstd, w, 0.0, "llama", config=config)
        return tuple(one for one in got if one is not None)

    return Step(forward) if step == "forward" else Step(backward, setup)


def summary(rows: list[Row]) -> list[str]:
    """The best setting for each kernel and width, over all its shapes, against the table's.

    A setting is as good as the mean of its logarithms of time over the best time of each shape: a
    table that only knows the width must not pay at one shape for another.
    """
    slowdown: dict[tuple[str, str, int], dict[str, list[float]]]
    slowdown = defaultdict(lambda: defaultdict(list))
    shapes = defaultdict(set)
    best: dict[tuple[str, str, int, int], float] = {}
    timed = [row for row in rows if row.median_us is not None]
    for row in timed:
        assert row.median_us is not None
        key = (row.op, row.step, row.rows, row.n)
        best[key] = min(best.get(key, math.inf), row.median_us)
        shapes[row.op, row.step, row.n].add(row.rows)
    for row in timed:
        assert row.median_us is not None
        key = (row.op, row.step, row.n)
        over = row.median_us / best[row.op, row.step, row.rows, row.n]
        slowdown[key][row.contender].append(math.log(over))
    lines = []
    for key, by_setting in slowdown.items():
        # Settings that failed or ran out of time at one shape are no choice.
        whole = {k: v for k, v in by_setting.items() if len(v) == len(shapes[key])}
        if not whole:
            continue
        cost = {name: math.exp(sum(logs) / len(logs)) for name, logs in whole.items()}
        first = min((name for name in cost if name != TABLE), key=cost.__getitem__, default="none")
        told = f"{first}, {cost.get(first, math.nan):.3f}x of the best of each shape"
        now = f"; the table's {cost[TABLE]:.3f}x" if TABLE in cost else "; the table's: not timed"
        lines.append(f"{key[0]} {key[1]} N={key[2]}: {told}{now}")
    return lines


def tiny_cases() -> list[Case]:
    """One of each group, for a dry run."""
    first = {case.group: case for case in reversed(sweep_cases())}
    return [replace(case, rows=19, n=128 if case.n <= 1024 else 200) for case in first.values()]


def run_sweep(case: Case, clock: Clock | NoClock, budget: Budget, few: bool = False) -> list[Row]:
    """Sweep each kernel of a case.

    Args:
        case: the shape.
        clock: times, or not.
        budget: of the whole run.
        few: two settings only.
    """
    if not kernels_run(clock.device):
        status = "not run: the kernels need a GPU or TRITON_INTERPRET=1"
        return [
            blank(case, step, one, status)
            for step in steps(case)
            for one in sweep_contenders(case, step, few)
        ]
    rows = []
    for step in steps(case):
        rows += run_case(case, sweep_contenders(case, step, few), clock, budget)
    return rows
