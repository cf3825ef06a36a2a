"""What one decoder layer costs the host: thread CPU time and Python calls, forward and backward.

Plain HF, transformers' own TP, torch's DTensor TP + SequenceParallel, hf_sp, and PEFT's LoRA alone
and under hf_sp, side by side in one process: rank 0 of a fake world of 8, tiny float32 tensors on
the CPU, so that what is measured is the work of launching and not arithmetic. A figure is the slope
between models of 4 and 12 layers: embedding, head and loss drop out, also where a loss makes its
gradients in the forward. Rounds are interleaved, and a ratio is the median over rounds of the ratio
within a round. Calls are exact; single times move with the machine, paired ratios far less.

    python scripts/bench/host_cost.py                    # writes scripts/bench/results/
    python scripts/bench/host_cost.py --rounds 10 --only hf_sp hf_sp-lora    # writes nothing
    python scripts/bench/host_cost.py --profile hf_sp    # cProfile's top 40, forward and backward
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import platform
import pstats
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from types import FrameType
from typing import Any

# Not this folder: transformers looks for a package called `kernels`, and would find kernels.py.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import peft
import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from transformers import LlamaForCausalLM

from hf_sp.estimate import fake_world
from scripts.bench._cost.layers import LayerShape
from scripts.bench.step_cost import (
    RESULTS,
    Apply,
    Layout,
    dtensor_sp,
    hf_native,
    hf_sp_layout,
    make_config,
    unsharded,
)

TP = 8
SEQ = 16
SHAPE = LayerShape(hidden=64, intermediate=256, heads=8, kv_heads=8, head_dim=8)
DEPTHS = (4, 12)
WARM_UP = 9  # the first 8 forwards of hf_sp compare their inputs over the ranks
PROFILED_STEPS = 20

# Counted apart: how often torch's caches compare a spec depends on collisions of addresses' hashes,
# which differ from process to process.
COMPARISONS = {
    function.__code__
    for function in (DTensorSpec.__eq__, DTensorSpec._check_equals, DeviceMesh.__eq__)
}


def with_lora(layout: Layout) -> Layout:
    """Add LoRA to every linear of the layers, then apply the layout."""

    def adapted(mesh: DeviceMesh) -> Apply:
        apply = layout(mesh)
        config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        return lambda model: apply(peft.get_peft_model(model, config))

    return adapted


@dataclass(frozen=True, slots=True)
class Contender:
    """What is measured, and the contender that its ratio is to."""

    title: str
    layout: Layout
    base: str = "plain"


CONTENDERS: dict[str, Contender] = {
    "plain": Contender("plain HF", unsharded),
    "native": Contender("HF native TP", hf_native),
    "dtensor": Contender("DTensor TP+SP", dtensor_sp),
    "hf_sp": Contender("hf_sp", hf_sp_layout()),
    "hf_sp-nosp": Contender("hf_sp sp=False", hf_sp_layout(sp=False)),
    "peft": Contender("plain PEFT LoRA", with_lora(unsharded)),
    "hf_sp-lora": Contender("hf_sp LoRA", with_lora(hf_sp_layout()), base="peft"),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Forward and backward of one step, or of one layer: microseconds, or numbers of calls."""

    forward: float
    backward: float

    @property
    def step(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the results: a layer's cost on one rank."""

    name: str
    title: str
    forward_us: float
    backward_us: float
    step_us: float
    to_plain: float | None
    base: str
    to_base: float
    to_base_quartiles: tuple[float, float]
    python_calls: Cost
    c_calls: Cost
    comparisons: Cost


def names_with_bases(names: Collection[str]) -> list[str]:
    """Return these contenders and what their ratios are to, in the table's order."""
    wanted = {*names, *(CONTENDERS[name].base for name in names)}
    return [name for name in CONTENDERS if name in wanted]


class Step:
    """A training step of one contender with so many layers."""

    def __init__(self, layout: Layout, mesh: DeviceMesh, layers: int) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = layout(mesh)(LlamaForCausalLM(make_config(SHAPE, SEQ, layers)))
        self.model.train()
        self.ids = torch.zeros(1, SEQ, dtype=torch.long)
        for _ in range(WARM_UP):
            self.clear()
            self.forward().backward()

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def forward(self) -> Tensor:
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def seconds(self) -> Cost:
        """Time one step by this thread's CPU clock: backward of a CPU graph runs in its caller."""
        self.clear()
        start = time.thread_time()
        loss = self.forward()
        between = time.thread_time()
        loss.backward()
        return Cost(between - start, time.thread_time() - between)

    def calls(self) -> dict[str, Cost]:
        """Count the calls of one step: see `counted`."""
        self.clear()
        loss, forward = counted(self.forward)
        _, backward = counted(loss.backward)
        return {event: Cost(forward[event], backward[event]) for event in forward}


def counted(function: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """Run a function under sys.setprofile and count its events.

    Returns its result, and how many Python functions were entered ("call"), C functions called
    from Python ("c_call"), and Python functions entered to compare specs ("comparison").
    """
    counts = {"call": 0, "c_call": 0, "comparison": 0}

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code in COMPARISONS:
            counts["comparison"] += event == "call"
        elif event in counts:
            counts[event] += 1

    # A collection in between would count finalizers, too.
    gc.collect()
    gc.disable()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        result = function()
    finally:
        sys.setprofile(before)
        gc.enable()
    counts["c_call"] -= 1  # sys.setprofile itself
    return result, counts


def slope(small: Cost, large: Cost, scale: float = 1.0) -> Cost:
    """Return a layer's cost, as the slope between the two depths."""
    each = scale / (DEPTHS[1] - DEPTHS[0])
    forward, backward = large.forward - small.forward, large.backward - small.backward
    return Cost(forward * each, backward * each)


@contextmanager
def contenders(names: Collection[str]) -> Iterator[dict[str, tuple[Step, Step]]]:
    """Make both depths of these contenders, on one thread, as rank 0 of a fake world."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with fake_world(TP) as mesh:
            yield {
                name: (
                    Step(CONTENDERS[name].layout, mesh, DEPTHS[0]),
                    Step(CONTENDERS[name].layout, mesh, DEPTHS[1]),
                )
                for name in names
            }
    finally:
        torch.set_num_threads(threads)


def count_calls(steps: dict[str, tuple[Step, Step]]) -> dict[str, dict[str, Cost]]:
    """Count each contender's calls per layer."""
    counts = {}
    for name, (small, large) in steps.items():
        few, many = small.calls(), large.calls()
        counts[name] = {event: slope(few[event], many[event]) for event in few}
    return counts


def time_rounds(steps: dict[str, tuple[Step, Step]], rounds: int) -> dict[str, list[Cost]]:
    """Time each contender's layer in microseconds, once a round, another one first each time."""
    names = list(steps)
    times: dict[str, list[Cost]] = {name: [] for name in names}
    for i in range(rounds):
        gc.collect()
        gc.disable()
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            small, large = steps[name]
            times[name].append(slope(small.seconds(), large.seconds(), scale=1e6))
        gc.enable()
    return times


def measure(names: Collection[str], rounds: int) -> list[Row]:
    """Measure these contenders and what their ratios are to."""
    with contenders(names_with_bases(names)) as steps:
        counts = count_calls(steps)
        times = time_rounds(steps, rounds)

    def ratios(name: str, base: str) -> list[float]:
        pairs = zip(times[name], times[base], strict=True)
        return [own.step / other.step for own, other in pairs]

    rows = []
    for name, costs in times.items():
        base = CONTENDERS[name].base
        to_base = ratios(name, base)
        low, _, high = quantiles(to_base, n=4) if rounds > 1 else to_base * 3
        rows.append(
            Row(
                name=name,
                title=CONTENDERS[name].title,
                forward_us=median(cost.forward for cost in costs),
                backward_us=median(cost.backward for cost in costs),
                step_us=median(cost.step for cost in costs),
                to_plain=median(ratios(name, "plain")) if "plain" in times else None,
                base=CONTENDERS[base].title,
                to_base=median(to_base),
                to_base_quartiles=(low, high),
                python_calls=counts[name]["call"],
                c_calls=counts[name]["c_call"],
                comparisons=counts[name]["comparison"],
            )
        )
    return rows


HEADER = ("contender", "forward us", "backward us", "sum us", "/ plain HF", "/ base", "quartiles")
HEADER += ("base", "Python calls f + b", "sum", "comparing", "C calls f + b")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, in the order of HEADER."""
    times = (f"{row.forward_us:.0f}", f"{row.backward_us:.0f}", f"{row.step_us:.0f}")
    plain = "-" if row.to_plain is None else f"{row.to_plain:.2f}"
    spread = " to ".join(f"{quartile:.2f}" for quartile in row.to_base_quartiles)
    python, c = (f"{c.forward:.0f} + {c.backward:.0f}" for c in (row.python_calls, row.c_calls))
    calls = (python, f"{row.python_calls.step:.0f}", f"{row.comparisons.step:.0f}", c)
    return (row.title, *times, plain, f"{row.to_base:.2f}", spread, row.base, *calls)


NOTES = f"""\
Per rank and per decoder layer of a Llama, forward and backward of a training step: tp {TP} in a
fake world (no communication), hidden {SHAPE.hidden}, {SHAPE.heads} heads, B = 1, S = {SEQ}, float32
on one thread of a CPU; the slope between models of {DEPTHS[0]} and {DEPTHS[1]} layers. LoRA is
r = 8 on every linear of the layers, without dropout.
Times are medians of thread CPU time and move with the machine. `/ plain HF` and `/ base` are
medians over interleaved rounds of the ratio of the sums within a round, `quartiles` those of
`/ base`. Calls are what sys.setprofile reports, a generator's resumption included, and exact for a
Python version; `comparing` are the Python calls, beside the others, in which torch's caches compare
DTensor specs: a few more or less in each process, as hashes collide. What a model's forward does
once for every layer or parameter is in the slope. Python's collector is off while timing. A
collective of the fake world still runs its Python and is dispatched, and on a CPU the norms and
SwiGLU run as torch ops, not as kernels: the figures are of the work around them.
"""


def machine() -> str:
    """Name the machine in general words."""
    model = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        named = [x for x in cpus.read_text().splitlines() if x.startswith("model name")]
        model = named[0].split(":", 1)[1].strip() if named else model
    return f"{os.cpu_count()} cores, {model}"


def facts(rounds: int) -> dict[str, str]:
    """Return what a reader needs beside the figures."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "rounds": str(rounds),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def write_results(rows: list[Row], rounds: int, folder: Path) -> Path:
    """Write host_cost.md."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["# The host's cost of a decoder layer in a training step", "", NOTES]
    lines.append(", ".join(f"{key} {value}" for key, value in facts(rounds).items()) + ".")
    lines.append("Made by `python scripts/bench/host_cost.py`.\n")
    lines.append("| " + " | ".join(HEADER) + " |")
    lines.append("|" + "---|" * len(HEADER))
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    path = folder / "host_cost.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def profile(name: str) -> None:
    """Print where one contender's forward and backward spend their time."""
    profiler = cProfile.Profile(time.thread_time)
    with contenders([name]) as steps:
        step = steps[name][1]
        for _ in range(PROFILED_STEPS):
            step.clear()
            profiler.enable()
            step.forward().backward()
            profiler.disable()
    print(f"{CONTENDERS[name].title}: {PROFILED_STEPS} steps of {DEPTHS[1]} layers")
    pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, help="writes no table")
    parser.add_argument("--profile", choices=CONTENDERS, help="print cProfile's top 40, no table")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the markdown")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels are not what a host pays
    if options.profile:
        profile(options.profile)
        return
    console = Console() if Console().is_terminal else Console(width=200)
    rows = measure(options.only or CONTENDERS, options.rounds)
    table = Table(*HEADER, title=f"one decoder layer on the host, {options.rounds} rounds")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    console.print(NOTES)
    if options.json:
        data = {**facts(options.rounds), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(data, indent=2) + "\n")
    if not options.only:
        console.print(f"written: {write_results(rows, options.rounds, options.out)}")


if __name__ == "__main__":
    main()
