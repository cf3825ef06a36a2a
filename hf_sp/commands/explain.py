"""Is my model supported, and what will be done to it: the plan, layouts and collectives of a layer.

No weights, GPU or launcher are needed. What is printed is what ``hf_sp.verify`` holds a step to.

    hf-sp explain meta-llama/Llama-3.1-8B --tp 8
    hf-sp explain ./config.json --tp 4 --ep 4 --layer 3 --plot layer.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedConfig

from hf_sp.api import Support, supports
from hf_sp.commands.rank import DTYPES, build_on_meta
from hf_sp.errors import ConfigError
from hf_sp.loading import load_config
from hf_sp.plan.layouts import Collective, Stage, StepLayout, Tokens
from hf_sp.plan.step import step_layout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("name", metavar="NAME", help="folder, config.json, or cached name")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--no-sp", dest="sp", action="store_false")
    parser.add_argument("--seq", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows of a forward")
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="adapters on all linears")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--layer", type=int, default=-1, help="which is shown; default: the last")
    parser.add_argument("--plot", metavar="FILE", help="draw that layer")


def run(options: argparse.Namespace) -> None:
    """The command; status 1 if the model is not supported."""
    config = load_config(options.name)
    found = supports(config, options.tp, options.sp, ep=options.ep)
    if not found:
        if options.json:
            _write({"name": options.name, "supported": False, "reason": found.reason})
        else:
            Console().print(f"{options.name}: not supported\n{escape(found.reason)}")
        sys.exit(1)
    layout = layout_of(config, found, options)
    layers = len(layout.layers)
    if not -layers <= options.layer < layers:
        raise ConfigError(
            "the model has no such layer",
            where="--layer",
            got=str(options.layer),
            legal=f"0 to {layers - 1}; -1 is the last",
        )
    layer = layout.layers[options.layer]
    if options.plot:
        from hf_sp.commands.explain_plot import plot

        plot(options.plot, options.name, layer, options.tp)
    if options.json:
        _write({"name": options.name, "supported": True, **as_data(found, layout)})
        return
    console = Console()
    console.print(str(found.plan), highlight=False, markup=False)
    shape = f"{options.batch} x {options.seq} tokens, {options.dtype}"
    console.print(f"\nA step of {shape}: a rank's shard is SCATTERED, the whole sequence FULL.")
    parts = ("input", "attention", "mlp", "residual", "output")
    row = ", ".join(f"{part} {getattr(layer, part)}" for part in parts)
    console.print(f"{layer.path}: {row}")
    console.print(table([layout.begin, *layer.stages, layout.end], f"Collectives: {layer.path}"))


def layout_of(config: PreTrainedConfig, found: Support, options: argparse.Namespace) -> StepLayout:
    """The layouts of a step of the command's sizes."""
    assert found.plan is not None
    dtype = DTYPES[options.dtype]
    tokens = Tokens(
        options.batch,
        options.seq,
        dtype.itemsize,
        options.lora,
        router_logits=bool(getattr(config, "output_router_logits", False)),
    )
    return step_layout(build_on_meta(config, dtype), found.plan, tokens)


def as_data(found: Support, layout: StepLayout) -> dict[str, Any]:
    """The plan and the layouts for programs: every collective has its payload."""
    every = [layout.begin, *(s for layer in layout.layers for s in layer.stages), layout.end]
    data = asdict(layout)
    ends = [data["begin"], *(s for layer in data["layers"] for s in layer["stages"]), data["end"]]
    for stage, entry in zip(every, ends, strict=True):
        for one, other in zip(stage.collectives, entry["collectives"], strict=True):
            other["bytes"] = one.bytes
    totals: dict[str, dict[str, dict[str, int]]] = {"forward": {}, "backward": {}}
    for one in layout.collectives():
        sums = totals[one.phase].setdefault(one.kind, {"calls": 0, "bytes": 0})
        sums["calls"], sums["bytes"] = sums["calls"] + 1, sums["bytes"] + one.bytes
    assert found.plan is not None
    return {"plan": asdict(found.plan), "layout": data, "totals": totals}


def table(stages: Iterable[Stage], title: str) -> Table:
    """Stages and their collectives for people."""
    shown = Table(title=title)
    for head in ("", "layout", "phase", "collective", "of", "shape"):
        shown.add_column(head)
    shown.add_column("MiB", justify="right")
    for stage in stages:
        way = list(dict.fromkeys((stage.takes, stage.inside, stage.gives)))
        ways = f"{way[0]} > {way[1]} > {stage.gives}" if len(way) > 1 else way[0]
        named = False
        for one in _alike(stage.collectives):
            first = (f"{stage.path}\n{stage.what}", ways) if not named else ("", "")
            shown.add_row(*first, *one)
            named = True
        shown.add_section()
    return shown


def _alike(collectives: Iterable[Collective]) -> Iterable[tuple[str, ...]]:
    """Rows of a table; those of one kind and shape in a row."""
    counts: dict[Collective, int] = {}
    for one in sorted(collectives, key=lambda one: one.phase == "backward"):
        counts[one] = counts.get(one, 0) + 1
    for one, count in counts.items():
        times = f"{count} x " if count > 1 else ""
        about = "about " if one.varies else ""
        shape = f"{about}[{', '.join(map(str, one.shape))}]"
        size = f"{one.bytes / 2**20:.2f}"
        yield one.phase, f"{times}{one.kind}", one.what, escape(shape), size


def _write(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer, indent=1, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, torch.dtype) else list(value)
