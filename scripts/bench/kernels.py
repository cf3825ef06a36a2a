"""Our kernels and others' for the same operations, on one GPU: right by float64, then timed.

RMSNorm, add + RMSNorm, SwiGLU and cross entropy, forward and backward, for ours, transformers in
eager, F.rms_norm, torch.compile, Liger-Kernel and quack: medians of interleaved calls, and GB/s as
a share of the copy bandwidth measured in the same run. Ends by itself after --seconds.

    python scripts/bench/kernels.py                    # on a GPU, writes scripts/bench/results/
    python scripts/bench/kernels.py --only norm,ce --out DIR
    python scripts/bench/kernels.py --sweep            # launch settings, for the fixed table
    python scripts/bench/kernels.py --dry-run          # on a CPU: all of it once, tiny, not timed

With TRITON_INTERPRET=1 a dry run runs the Triton kernels themselves, as well as Triton's own
interpreter can (the tests mend it: tests/kernels/interpreter.py); without it their torch
counterparts. Exits with 1 if anything of ours is wrong, with 2 if it cannot run. A bar that is not
met is a result and no error.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts/bench/results"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--only", help="groups, with commas between: norm, sp, ce, qnorm, swiglu")
    add(
        "--out",
        type=Path,
        help="folder of the CSV and markdown (default: scripts/bench/results, of all groups)",
    )
    add(
        "--seconds", type=float, default=480, help="rows left after that are 'skipped: out of time'"
    )
    add("--sweep", action="store_true", help="sweep our kernels' launch settings instead")
    add("--dry-run", action="store_true", help="tiny sizes on the CPU, nothing timed")
    options = parser.parse_args(arguments)
    if options.dry_run and options.out and options.out.resolve() == RESULTS.resolve():
        parser.error("a dry run has no results for that folder: give --out another, or none")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write."""
    options, begun = parse(arguments), time.monotonic()
    # Not above: transformers looks for a package named `kernels`, and finds this file where this
    # folder is on the path. It must then be quick to import, and need nothing.
    import torch
    from rich.console import Console

    from scripts.bench._kernels import cases, clock, report, runner, sweep
    from scripts.bench._kernels.contenders import contenders

    # Errors are shown as they are: they may hold brackets.
    console = Console(width=None if Console().is_terminal else 250, markup=False, highlight=False)
    if not options.dry_run and not torch.cuda.is_available():
        console.print(
            "There is no CUDA device to measure. On a CPU: --dry-run, which times nothing."
        )
        return 2
    dry = options.dry_run
    everything = sweep.sweep_cases() if options.sweep else cases.all_cases()
    if dry:
        everything = sweep.tiny_cases() if options.sweep else cases.tiny_cases()
    try:
        wanted = cases.chosen(everything, options.only)
    except ValueError as error:
        console.print(f"--only: {error}")
        return 2

    budget = runner.Budget(options.seconds - (time.monotonic() - begun))
    timer: clock.Clock | clock.NoClock = (
        clock.NoClock() if dry else clock.Clock(torch.device("cuda", 0))
    )
    name = "kernels_sweep" if options.sweep else "kernels"
    # Some groups only would leave a file there that lacks the others.
    out = options.out or (None if dry or options.only else RESULTS)
    rows: list[runner.Row] = []
    copies: list[float] = []

    def save() -> dict[str, str]:
        """After each case: a run that is ended from outside leaves what it has."""
        report.judge(rows, copies)
        about = report.environment(timer.device, copies)
        if out is not None:
            report.write_csv(rows, about, out / f"{name}.csv")
        return about

    for case in wanted:
        copies += [found for found in [timer.bandwidth()] if found is not None]
        if options.sweep:
            rows += sweep.run_sweep(case, timer, budget, few=dry)
        else:
            rows += runner.run_case(case, contenders(case.op), timer, budget)
        save()
        console.print(f"{case.group} {case.op} {case.shape}: {budget.left():.0f} s left")
    about = save()
    title = "Launch settings of the kernels" if options.sweep else "Kernels, timed"
    console.print(report.table(rows, title))
    more = sweep.summary(rows) if options.sweep else report.bars(rows)
    console.print(*more, about, sep="\n")
    if out is not None:
        flags = (" --sweep" * options.sweep) + (f" --only {options.only}" if options.only else "")
        command = f"python scripts/bench/kernels.py{flags}{' --dry-run' * dry}"
        report.write_markdown(rows, about, out / f"{name}.md", title, command, more)
        console.print(f"written: {out}/{name}.csv, {out}/{name}.md")
    wrong = runner.wrong(rows)
    for row in wrong:
        console.print(f"not right: {row.op} {row.step} {row.shape} {row.contender}: {row.status}")
    return 1 if wrong else 0


if __name__ == "__main__":
    # The checkout in place of this folder: see main.
    sys.path[0] = str(ROOT)
    sys.exit(main())
