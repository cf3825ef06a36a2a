"""The picture of ``hf-sp explain``: one decoder layer, its layouts, and what is sent between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_sp.plan.layouts import LayerLayout, Stage

COLORS = {"SCATTERED": "#dbeafe", "FULL": "#fde68a"}


def plot(file: str, name: str, layer: LayerLayout, tp: int) -> None:
    """Draw a layer downwards: blocks as boxes in the colour of their layout, collectives beside."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    blocks = [stage for stage in layer.stages if stage.path != layer.path]
    sums = [one for stage in layer.stages if stage.path == layer.path for one in stage.collectives]
    rows: list[tuple[str, str, Stage | None]] = [("input, norms", layer.input, None)]
    for block in blocks:
        rows.append((block.what, block.inside, block))
        rows.append(("residual sum, norms", layer.residual, None))
    heights = [1.1 if stage is None else 2.4 for _, _, stage in rows]
    figure, axes = pyplot.subplots(figsize=(10, 0.45 * sum(heights) + 1), layout="constrained")
    axes.set(xlim=(0, 10), ylim=(-sum(heights) - 0.3, 0.6))
    axes.axis("off")
    top = 0.0
    for (what, layout, stage), height in zip(rows, heights, strict=True):
        _box(axes, what, layout, top, height)
        if stage is not None:
            for left, phase in ((3.3, "forward"), (6.7, "backward")):
                found = [_line(one) for one in stage.collectives if one.phase == phase]
                text = "\n".join([phase, *(found or ["no collective"])])
                axes.text(left, top - height / 2, text, va="center", fontsize=8)
        top -= height
    title = f"{Path(name).name}, {layer.path}, tp={tp}"
    if sums:
        title += "\nand once a layer, backward: " + "; ".join(map(_line, sums))
    axes.set_title(title, fontsize=10)
    handles = [Patch(color=color) for color in COLORS.values()]
    labels = [f"{layout}: {_of(layout)}" for layout in COLORS]
    axes.legend(handles, labels, loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.08))
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _of(layout: str) -> str:
    return "a rank's shard of the sequence" if layout == "SCATTERED" else "the whole sequence"


def _line(one: Any) -> str:
    return f"{one.kind} {list(one.shape)}: {one.what}"


def _box(axes: Any, what: str, layout: str, top: float, height: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (0.2, top - height + 0.12)
    style = "round,pad=0.02,rounding_size=0.1"
    box = FancyBboxPatch(corner, 2.7, height - 0.24, boxstyle=style, fc=COLORS[layout], ec="black")
    axes.add_patch(box)
    axes.text(1.55, top - height / 2, what, ha="center", va="center", fontsize=9)
