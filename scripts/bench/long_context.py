"""The table and picture of docs/long-context.md: memory of long rows, and how long they can be.

Predicted by `hf-sp estimate`'s own code, without weights or a GPU: weights, gradients and AdamW in
bfloat16 (8 bytes a parameter, sharded over all GPUs) and a step of one row, for each way to
exchange tokens and to save memory. Points that are in the results are not counted again.

    python scripts/bench/long_context.py           # some minutes; writes results/ and docs/
    python scripts/bench/long_context.py --fresh   # counts all of them again
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
from transformers import LlamaConfig, PreTrainedConfig, Qwen3_5TextConfig, Qwen3Config

from hf_sp.commands.estimate import GPUS, USABLE
from hf_sp.commands.layers import count_whole, layer_collectives
from hf_sp.commands.rank import Run
from hf_sp.errors import HfSpError
from scripts.bench._cost.scan import kernel_scan
from scripts.bench._points import between_marks, llama_3_1, read_points, write_points

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results" / "long_context.csv"
PAGE = ROOT / "docs" / "long-context.md"
PICTURE = PAGE.parent / "long_context.png"
GIB, TILE = 2**30, 4096
CAPACITY = int(GPUS["h100"] * 1e9 * USABLE)

CONFIGS: dict[str, PreTrainedConfig] = {
    "Llama-3.1-8B": LlamaConfig(**llama_3_1("8B")),
    "Qwen3-8B": Qwen3Config(
        hidden_size=4096,
        intermediate_size=12288,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=36,
        vocab_size=151936,
        head_dim=128,
    ),
    "Qwen3.5-27B": Qwen3_5TextConfig(
        hidden_size=5120,
        intermediate_size=17408,
        num_attention_heads=24,
        num_key_value_heads=4,
        linear_num_value_heads=48,
        num_hidden_layers=64,
    ),
    "Llama-3.1-70B": LlamaConfig(**llama_3_1("70B")),
}
# GPUs, by the tp and cp of their one group.
WORLDS: dict[str, dict[int, tuple[int, int]]] = {
    "Llama-3.1-8B": {1: (1, 1), 8: (1, 8), 32: (1, 32)},
    "Qwen3-8B": {8: (1, 8)},
    "Qwen3.5-27B": {8: (1, 8)},
    "Llama-3.1-70B": {32: (1, 32)},
}
WAYS: dict[str, Run] = {
    "checkpointing": Run(checkpointing=True),
    "+ offload": Run(checkpointing=True, offload=True),
    "+ tiles": Run(checkpointing=True, mlp_tile=TILE),
    "+ both": Run(checkpointing=True, offload=True, mlp_tile=TILE),
}
# Others than the first are counted for one world, of the ways without and with everything.
MODES = ("ulysses", "ring", "hybrid")
COMPARED, ENDS = ("Llama-3.1-8B", 8), ("checkpointing", "+ both")
COLORS = {"checkpointing": "#6b7280", "+ offload": "#d97706", "+ tiles": "#65a30d"}
COLORS |= {"+ both": "#2563eb"}


@dataclass(frozen=True, slots=True)
class Point:
    """Bytes on each GPU in a step of a row, those that wait on the host, and those of a layer that
    travel. ``refused``: why it is not counted.
    """

    model: str
    gpus: int
    mode: str
    way: str
    seq: int
    peak: int = 0
    host: int = 0
    moved: int = 0
    refused: str = ""


def key(point: Point) -> tuple[str, int, str, str, int]:
    """What it is a point of."""
    return point.model, point.gpus, point.mode, point.way, point.seq


def lengths(gpus: int) -> tuple[int, int]:
    """Of a row: the peak is convex in it, and a line but for kinks among short ones."""
    return (32768, 131072) if gpus == 1 else (131072 * gpus, 262144 * gpus)


def wanted() -> Iterable[tuple[tuple[str, int, str, str, int], Run]]:
    """All points."""
    for model, worlds in WORLDS.items():
        for gpus, (tp, cp) in worlds.items():
            for mode in MODES if (model, gpus) == COMPARED else MODES[:1]:
                for way in WAYS if mode == MODES[0] else ENDS:
                    for seq in lengths(gpus):
                        run = replace(WAYS[way], tp=tp, cp=cp, cp_mode=mode, seq=seq)
                        yield (model, gpus, mode if cp > 1 else "one GPU", way, seq), run


def count_point(at: tuple[str, int, str, str, int], run: Run) -> Point:
    """Count one."""
    config = CONFIGS[at[0]]
    try:
        with kernel_scan():
            found, layer = count_whole(config, run), layer_collectives(config, run)
    except HfSpError as error:
        return Point(*at, refused=str(error).splitlines()[0])
    moved = sum(c.bytes for kinds in layer.values() for c in kinds.values())
    return Point(*at, found.peak, found.host, moved)


def read() -> list[Point]:
    """The committed points."""
    return read_points(Point, RESULTS)


def fits(short: Point, long: Point) -> int:
    """The longest row, by the line through two points; of whole 1,024 tokens a GPU."""
    slope = (long.peak - short.peak) / (long.seq - short.seq)
    tokens = long.seq + (CAPACITY - long.peak) / slope
    step = 1024 * long.gpus
    return max(0, int(tokens // step) * step)


def table(points: list[Point]) -> str:
    """A row for each model, GPUs, mode and way, as markdown."""
    head = "model, GPUs", "mode", "saved by", "tokens", "GiB a GPU", "GiB host a GPU"
    lines = [f"| {' | '.join((*head, 'MB moved a layer', 'longest row'))} |", "|---" * 8 + "|"]
    pairs: dict[tuple[str, int, str, str], list[Point]] = {}
    for p in points:
        pairs.setdefault(key(p)[:4], []).append(p)
    for (model, gpus, mode, way), (short, long) in pairs.items():
        if short.refused:
            # Of all ways alike.
            row = f"| {model}, {gpus} | {mode} | | | refused: {short.refused} | | | |"
            lines += [row] if row not in lines else []
            continue
        sizes = f"{short.peak / GIB:.1f} | {short.host / GIB:.1f} | {short.moved / 1e6:,.0f}"
        start = f"| {model}, {gpus} | {mode} | {way} | {short.seq:,} |"
        lines.append(f"{start} {sizes} | {fits(short, long):,} |")
    return "\n".join(lines)


def put_table(text: str, points: list[Point]) -> str:
    """The page with this table between its marks."""
    return between_marks(text, "table", table(points))


def draw(points: list[Point], path: Path) -> None:
    """A panel for each model and number of GPUs: peak against tokens, a line for each way."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    counted = [p for p in points if not p.refused and p.mode in ("one GPU", MODES[0])]
    worlds = list(dict.fromkeys((p.model, p.gpus) for p in counted))
    size = (3.3 * len(worlds), 4.2)
    figure, panels = pyplot.subplots(1, len(worlds), figsize=size, layout="constrained")
    lines: dict[str, Any] = {}
    for (model, gpus), axes in zip(worlds, panels, strict=True):
        for way, color in COLORS.items():
            here = [p for p in counted if (p.model, p.gpus, p.way) == (model, gpus, way)]
            xs, ys = [p.seq / 1e6 for p in here], [p.peak / GIB for p in here]
            (lines[way],) = axes.plot(xs, ys, marker="o", color=color)
        axes.axhline(CAPACITY / GIB, color="black", linestyle=":", linewidth=1)
        axes.set(xlabel="million tokens of the row", title=f"{model}, {gpus} GPU")
        axes.set_ylim(0)
    panels[0].set_ylabel("predicted GiB on each GPU")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--fresh", action="store_true", help="count all of them again")
    options = parser.parse_args(arguments)
    if options.fresh:
        RESULTS.unlink(missing_ok=True)
    known = {key(p): p for p in read()}
    for at, run in track(list(wanted()), "counting", console=Console(stderr=True)):
        if at not in known:
            known[at] = count_point(at, run)
            write_points(Point, RESULTS, (known[k] for k, _ in wanted() if k in known))
    points = [known[k] for k, _ in wanted()]
    write_points(Point, RESULTS, points)
    PAGE.write_text(put_table(PAGE.read_text(), points))
    draw(points, PICTURE)


if __name__ == "__main__":
    main()
