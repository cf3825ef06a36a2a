"""The pictures and tables of docs/memory.md: what training an 8B and a 70B needs on each GPU.

Counted by `hf-sp estimate`'s own code, without weights or a GPU: weights, gradients, AdamW and
activations of a step of one row in bfloat16, against its length, for tp 1, 2, 4, 8 and five ways
to keep activations. Points that are in the results are not counted again.

    python scripts/bench/memory_figures.py           # some minutes; writes results/ and docs/
    python scripts/bench/memory_figures.py --fresh   # counts all of them again
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Not this folder: transformers looks for a package called `kernels`, and would find kernels.py.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.progress import track
from transformers import LlamaConfig

from hf_sp.commands.estimate import GPUS
from hf_sp.commands.layers import count_whole
from hf_sp.commands.rank import Run
from scripts.bench._points import between_marks, llama_3_1, read_points, write_points

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results" / "memory.csv"
PAGE = ROOT / "docs" / "memory.md"
GIB = 2**30
# The peak is a line in the number of tokens, but for kinks: two points show it.
LENGTHS = (8192, 131072)
MODELS = "8B", "70B"
PLAIN = Run(library="one GPU", sp=False)
# What is said of a way, and how it is run; the first and last are all that one GPU has.
WAYS: dict[str, Run] = {
    "TP": Run(sp=False, recompute="none"),
    "SP": Run(recompute="none"),
    "SP + recompute (default)": Run(),
    "SP + checkpointing": Run(checkpointing=True),
}
ALONE: dict[str, Run] = {
    "one GPU": PLAIN,
    "one GPU + checkpointing": replace(PLAIN, checkpointing=True),
}
COLORS = {"one GPU": "#6b7280", "one GPU + checkpointing": "#9ca3af", "TP": "#d97706"}
COLORS |= {"SP": "#65a30d", "SP + recompute (default)": "#2563eb", "SP + checkpointing": "#7c3aed"}


@dataclass(frozen=True, slots=True)
class Point:
    """One figure of a picture."""

    model: str
    tp: int
    way: str
    seq: int
    peak: int
    weights: int
    gradients: int
    optimizer: int
    activations: int


def key(point: Point) -> tuple[str, int, str, int]:
    """What it is a figure of."""
    return point.model, point.tp, point.way, point.seq


def config_of(model: str) -> LlamaConfig:
    """Llama 3.1 of that size."""
    return LlamaConfig(**llama_3_1(model))


def wanted() -> Iterable[tuple[str, int, str, int, Run]]:
    """All points."""
    for model in MODELS:
        for tp in (1, 2, 4, 8):
            for way, run in (ALONE if tp == 1 else WAYS).items():
                for seq in LENGTHS:
                    yield model, tp, way, seq, replace(run, tp=tp, seq=seq)


def count_point(model: str, tp: int, way: str, seq: int, run: Run) -> Point:
    """Count one."""
    found = count_whole(config_of(model), run)
    kinds = found.kinds
    parts = kinds.weights, kinds.gradients, kinds.optimizer, kinds.activations
    return Point(model, tp, way, seq, found.peak, *parts)


def read() -> list[Point]:
    """The committed points."""
    return read_points(Point, RESULTS)


def table(points: Iterable[Point], model: str, seq: int) -> str:
    """GiB on each GPU at one length, as markdown."""
    peaks = {(p.tp, p.way): p.peak for p in points if (p.model, p.seq) == (model, seq)}
    lines = [f"| {model}, {seq:,} tokens | tp=1 | tp=2 | tp=4 | tp=8 |", "|---|---|---|---|---|"]
    for way in (*ALONE, *WAYS):
        cells = [peaks.get((tp, way)) for tp in (1, 2, 4, 8)]
        shown = ["" if cell is None else f"{cell / GIB:.1f}" for cell in cells]
        lines.append(f"| {way} | {' | '.join(shown)} |")
    return "\n".join(lines)


def tables(points: list[Point]) -> str:
    """All tables of the page."""
    return "\n\n".join(table(points, model, seq) for model in MODELS for seq in LENGTHS)


def put_tables(text: str, points: list[Point]) -> str:
    """The page with these tables between its marks."""
    return between_marks(text, "tables", tables(points))


def draw(points: list[Point], model: str, path: Path) -> None:
    """One panel for each tp: peak against tokens, a line for each way."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(13, 4.2), layout="constrained")
    lines: dict[str, Any] = {}
    for tp, axes in zip((1, 2, 4, 8), panels, strict=True):
        for way, color in COLORS.items():
            here = [p for p in points if (p.model, p.tp, p.way) == (model, tp, way)]
            if here:
                peaks = [p.peak / GIB for p in here]
                (lines[way],) = axes.plot([p.seq for p in here], peaks, marker="o", color=color)
        for gpu in ("h100", "h200"):
            height = GPUS[gpu] * 1e9 / GIB
            axes.axhline(height, color="black", linestyle=":", linewidth=1)
            axes.annotate(
                gpu.upper(),
                (LENGTHS[0], height),
                xytext=(0, 2),
                fontsize=8,
                textcoords="offset points",
            )
        axes.set(xlabel="tokens of the row", title=f"tp={tp}")
        axes.set_xticks((*LENGTHS, 65536), [f"{n // 1024}k" for n in (*LENGTHS, 65536)])
        axes.set_ylim(0)
    panels[0].set_ylabel(f"Llama-3.1-{model}: GiB on each GPU")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--fresh", action="store_true", help="count all of them again")
    parser.add_argument("--model", choices=MODELS, help="count those of one model alone")
    options = parser.parse_args(arguments)
    if options.fresh:
        RESULTS.unlink(missing_ok=True)
    known = {key(p): p for p in read()}
    for point in track(list(wanted()), "counting", console=Console(stderr=True)):
        if point[:4] not in known and options.model in (None, point[0]):
            # Another process may count the other model.
            found = count_point(*point)
            known = {key(p): p for p in read()} | {point[:4]: found}
            write_points(Point, RESULTS, (known[p[:4]] for p in wanted() if p[:4] in known))
    points = [known[p[:4]] for p in wanted() if p[:4] in known]
    PAGE.write_text(put_tables(PAGE.read_text(), points))
    for model in MODELS:
        draw(points, model, PAGE.parent / f"memory_{model.lower()}.png")


if __name__ == "__main__":
    main()
