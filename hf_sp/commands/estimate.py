"""Will it fit: bytes of a training step on each GPU, by kind, beside plain TP and one GPU.

The training code itself runs on fake tensors, as one rank of a world that is not there: no weights
and no GPU are needed. Not counted: the CUDA context and NCCL (1 to 3 GiB), the allocator's
fragmentation, kernels' workspaces.

    hf-sp estimate meta-llama/Llama-3.1-8B --tp 8 --seq 32768 --gpu h100
    hf-sp estimate ./config.json --search 8 --seq 65536 --gpu h100
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from typing import Any, get_args

from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from transformers import PreTrainedConfig

from hf_sp.api import CpMode
from hf_sp.commands.layers import count_whole, layer_collectives, longest
from hf_sp.commands.rank import DTYPES, LIBRARIES, OPTIMIZERS, Run
from hf_sp.errors import ConfigError, HfSpError
from hf_sp.estimate import CollectiveCount, Kinds
from hf_sp.loading import load_config
from hf_sp.state import Recompute

GIB = 2**30
GPUS = {"4090": 24, "l40s": 48, "a100-40": 40, "a100": 80, "h100": 80, "h200": 141, "b200": 180}
"""Gigabytes (10^9 bytes) by the makers' names."""
USABLE = 0.92
"""Share of a GPU's memory that tensors can have: the rest is the context, NCCL, fragmentation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("name", metavar="NAME", help="folder, config.json, or cached name")
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--dp-shard", type=int, default=1)
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--cp-mode", choices=get_args(CpMode), default="ulysses")
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--seq", type=int, default=8192, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1, help="rows of a group's forward")
    parser.add_argument("--no-sp", dest="sp", action="store_false")
    parser.add_argument("--recompute", choices=get_args(Recompute))
    parser.add_argument("--checkpointing", action="store_true", help="of each layer")
    parser.add_argument("--offload", action="store_true", help="checkpointed inputs to the host")
    parser.add_argument("--mlp-tile", type=int, metavar="TOKENS", help="MLPs in tiles of a shard")
    parser.add_argument("--lora", type=int, default=0, metavar="R", help="adapters on all linears")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--gpu", metavar="|".join(GPUS) + "|GB", help="also the longest sequence")
    parser.add_argument("--search", type=int, metavar="GPUS", help="degrees of so many GPUs")
    parser.add_argument("--plot", metavar="FILE", help="memory against tokens and tp")


def run(options: argparse.Namespace) -> None:
    """The command."""
    config = load_config(options.name)
    names = {f.name for f in fields(Run)} - {"library"}
    given = Run(**{name: getattr(options, name) for name in names})
    capacity = capacity_of(options.gpu)
    if options.plot:
        from hf_sp.commands.estimate_plot import plot

        rows: Iterable[dict[str, Any]] = plot(options.plot, options.name, config, given, capacity)
        if not options.json:
            return
    elif options.search:
        rows = search(config, given, options.search, capacity)
    else:
        rows = compare(config, given, capacity)
    if options.json:
        answer = {"name": options.name, "usable_bytes": capacity, "rows": list(rows)}
        sys.stdout.write(json.dumps(answer, indent=1) + "\n")
    else:
        found = list(rows)
        Console().print(table(options.name, given, found, capacity))
        for row in found:
            if row.get("layer"):
                Console().print(f"{row['library']}, a layer: {_spell(row['layer'])}")


def _spell(layer: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """The collectives of a layer for people."""
    parts = []
    for phase, kinds in layer.items():
        found = [f"{c['calls']} {k} ({c['bytes'] / 2**20:.1f} MiB)" for k, c in kinds.items()]
        if found:
            parts.append(f"{phase} {', '.join(found)}")
    return "; ".join(parts) or "no collectives"


def capacity_of(gpu: str | None) -> int | None:
    """Bytes that tensors may have on a GPU.

    Raises:
        ConfigError: it is neither known nor a number.
    """
    if gpu is None:
        return None
    try:
        gigabytes = GPUS[gpu] if gpu in GPUS else float(gpu)
    except ValueError:
        gigabytes = 0
    if not 0 < gigabytes < sys.maxsize:
        raise ConfigError(
            "that GPU is not known",
            where="--gpu",
            got=gpu,
            legal=f"{', '.join(GPUS)}, or gigabytes",
        )
    return int(gigabytes * 1e9 * USABLE)


def row_of(config: PreTrainedConfig, run: Run) -> dict[str, Any]:
    """A count as data."""
    found = count_whole(config, run)
    return {
        **asdict(run),
        "peak": found.peak,
        "when": found.when,
        "kinds": asdict(found.kinds),
        "peaks": dict(found.peaks),
        "kept": found.kept,
        "host": found.host,
        "collectives": _as_data(found.collectives),
    }


def _as_data(collectives: Mapping[str, Mapping[str, CollectiveCount]]) -> dict[str, Any]:
    return {
        phase: {kind: asdict(c) for kind, c in kinds.items()}
        for phase, kinds in collectives.items()
    }


def compare(config: PreTrainedConfig, run: Run, capacity: int | None) -> Iterator[dict[str, Any]]:
    """The run, the same with transformers' own tensor parallelism, and on one GPU."""
    for library in track(LIBRARIES, "counting", console=Console(stderr=True), transient=True):
        mine = replace(run, library=library)
        if library != "hf_sp":
            mine = replace(mine, dp_shard=1, cp=1, ep=1, recompute=None, sp=False)
            mine = replace(mine, offload=False, mlp_tile=None)
            mine = replace(mine, tp=1 if library == "one GPU" else mine.tp)
        try:
            row = row_of(config, mine)
        except HfSpError:
            raise
        except Exception as error:
            if library == "hf_sp":
                raise
            # The others are not ours to mend.
            yield {**asdict(mine), "error": f"{type(error).__name__}: {error}"}
            continue
        row["layer"] = _as_data(layer_collectives(config, mine))
        if capacity is not None:
            row["longest"] = longest(config, mine, capacity, row["peak"])
        yield row


def search(
    config: PreTrainedConfig, run: Run, gpus: int, capacity: int | None
) -> Iterable[dict[str, Any]]:
    """Every split of so many GPUs into tp and data parallel groups, at cp; those that fit first.

    Among those the least tp: its collectives are waited for, those of data parallel groups are not.
    """
    degrees = [tp for tp in range(1, gpus + 1) if gpus % (tp * run.cp) == 0]
    rows, refused = [], []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for tp in progress.track(degrees, description="counting"):
            mine = replace(run, tp=tp, dp_shard=gpus // tp // run.cp)
            try:
                rows.append(row_of(config, mine))
            except HfSpError as error:
                refused.append({**asdict(mine), "error": str(error)})
    limit = capacity if capacity is not None else sys.maxsize
    rows.sort(key=lambda row: (row["peak"] > limit, row["tp"]))
    return [*rows, *refused]


def table(name: str, run: Run, rows: Iterable[dict[str, Any]], capacity: int | None) -> Table:
    """The rows for people, in GiB a GPU."""
    tokens = f"{run.batch} x {run.seq} tokens"
    how = f"{run.dtype}, {run.optimizer}{f', LoRA r={run.lora}' if run.lora else ''}"
    found = Table(title=f"{name}: GiB on a GPU in a step of {tokens} ({how})")
    for head in ("", "tp", "cp", "dp", *(f.name for f in fields(Kinds)), "peak", "in", "kept"):
        found.add_column(head, justify="left" if not head else "right")
    if capacity is not None:
        found.add_column(f"fits {capacity / GIB:.1f} GiB", justify="right")
        found.add_column("longest", justify="right")
    for row in rows:
        begin = (row["library"], str(row["tp"]), str(row["cp"]), str(row["dp_shard"]))
        if "error" in row:
            found.add_row(*begin, row["error"].splitlines()[0])
            continue
        kinds = [f"{row['kinds'][f.name] / GIB:.2f}" for f in fields(Kinds)]
        tail = [f"{row['peak'] / GIB:.2f}", row["when"], f"{row['kept'] / GIB:.2f}"]
        if capacity is not None:
            tail += ["yes" if row["peak"] <= capacity else "no", f"{row.get('longest', 0):,}"]
        found.add_row(*begin, *kinds, *tail)
    return found
