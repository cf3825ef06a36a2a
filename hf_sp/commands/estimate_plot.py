"""The picture of ``hf-sp estimate``: memory of a GPU against tokens, a line for each tp."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedConfig

from hf_sp.commands.layers import count_whole
from hf_sp.commands.rank import Run
from hf_sp.errors import HfSpError

GIB = 2**30
DEGREES = (1, 2, 4, 8)


def plot(
    file: str, name: str, config: PreTrainedConfig, run: Run, capacity: int | None
) -> list[dict[str, Any]]:
    """Draw tp 1 to 8 at up to eight times the run's tokens, but for degrees that are refused.

    Returns:
        The points.
    """
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    lengths = [run.seq * n for n in (1, 2, 4, 8)]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    points: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for tp in track(DEGREES, "counting", console=console, transient=True):
        mine = replace(run, tp=tp)
        if tp == 1:
            mine = replace(mine, cp=1, dp_shard=1, ep=1, library="one GPU")
        try:
            peaks = [count_whole(config, replace(mine, seq=seq)).peak for seq in lengths]
        except HfSpError as error:
            console.print(f"tp={tp}: {str(error).splitlines()[0]}")
            points.append({**asdict(mine), "error": str(error)})
            continue
        both = zip(lengths, peaks, strict=True)
        points += [{**asdict(mine), "seq": seq, "peak": peak} for seq, peak in both]
        axes.plot(
            lengths,
            [peak / GIB for peak in peaks],
            marker="o",
            label="one GPU" if tp == 1 else f"tp={tp}, sp",
        )
    if capacity is not None:
        axes.axhline(capacity / GIB, color="black", linestyle=":", label="what a GPU has")
    axes.set(xlabel="tokens of a row", ylabel="GiB on a GPU", title=Path(name).name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return points
