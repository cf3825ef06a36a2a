"""What of this machine and environment may go wrong, each with its remedy. Status 1 if it will.

hf-sp doctor
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_sp.comm.watch import TIMES, seconds
from hf_sp.errors import ConfigError
from hf_sp.versions import TESTED, untested

Level = Literal["ok", "note", "bad"]
COLORS: dict[str, str] = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: ``bad`` fails a run, ``note`` may cost time or surprise."""

    what: str
    found: str
    level: Level = "ok"
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def run(options: argparse.Namespace) -> None:
    """The command."""
    found = [*versions(), *hardware(), *launcher(os.environ), *environment(os.environ)]
    bad = any(one.level == "bad" for one in found)
    if options.json:
        rows = [dataclasses.asdict(one) for one in found]
        sys.stdout.write(json.dumps({"healthy": not bad, "findings": rows}, indent=1) + "\n")
    else:
        table = Table(title="hf-sp doctor")
        for head in ("", "what", "found", "remedy"):
            table.add_column(head)
        for one in found:
            level = f"[{COLORS[one.level]}]{one.level}[/]"
            table.add_row(level, *map(escape, (one.what, one.found, one.remedy)))
        Console().print(table)
    sys.exit(1 if bad else 0)


def versions() -> Iterator[Finding]:
    """Installed packages against the range that the tests have run with."""
    python = platform.python_version()
    level: Level = "ok" if sys.version_info >= (3, 11) else "bad"
    yield Finding("Python", python, level, "" if level == "ok" else "Python 3.11 or newer")
    outside = {clause.split()[0]: clause for clause in untested()}
    for package, (oldest, newest) in TESTED.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            needed = package in ("torch", "transformers", "accelerate")
            remedy = f"pip install -c constraints.txt {package}" if needed else ""
            yield Finding(package, "not installed", "bad" if needed else "ok", remedy)
            continue
        if package in outside:
            remedy = f"if something fails, try {oldest} to {newest} first (constraints.txt)"
            yield Finding(package, outside[package], "note", remedy)
        else:
            yield Finding(package, installed)
    if importlib.util.find_spec("bitsandbytes") is not None:
        yield Finding(
            "bitsandbytes",
            "installed",
            "note",
            "its 8-bit optimizers and quantised weights are refused: torch's AdamW, plain weights",
        )


def hardware() -> Iterator[Finding]:
    """GPUs, how they reach each other, and what collectives run on."""
    if not dist.is_available():
        yield Finding("torch.distributed", "not built", "bad", "a torch that is built with it")
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding(
            "GPU", "none: gloo on the CPU", "note", "fine for tests and verify; slow for training"
        )
        return
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    same: Level = "ok" if len(names) == 1 else "note"
    remedy = (
        "" if same == "ok" else "the slowest sets the pace: CUDA_VISIBLE_DEVICES picks alike ones"
    )
    yield Finding("GPUs", f"{count} x {', '.join(names)}, CUDA {torch.version.cuda}", same, remedy)
    if not dist.is_nccl_available():
        yield Finding("NCCL", "not built into this torch", "bad", "torch's CUDA build for Linux")
    else:
        yield Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    if count > 1:
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        apart = [p for p in pairs if not torch.cuda.can_device_access_peer(*p)]
        if apart:
            i, j = apart[0]
            found = f"{len(apart)} of {len(pairs)} pairs have none, e.g. {i} and {j}"
            remedy = "tp inside of what NVLink joins (nvidia-smi topo -m), dp_shard between"
            yield Finding("direct access between GPUs", found, "note", remedy)
        else:
            yield Finding("direct access between GPUs", f"all {len(pairs)} pairs")


def launcher(env: Mapping[str, str]) -> Iterator[Finding]:
    """Who starts the ranks, and whether what it says is whole."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    given = [name for name in names if name in env]
    if not given:
        remedy = "torchrun --nproc_per_node N script.py, or accelerate launch"
        yield Finding("launcher", "none: a world of one", "ok", remedy)
    elif len(given) < len(names):
        missing = ", ".join(name for name in names if name not in env)
        remedy = "start with torchrun or accelerate launch, or set all of them"
        yield Finding("launcher", f"{', '.join(given)} without {missing}", "bad", remedy)
    else:
        yield Finding("launcher", f"rank {env['RANK']} of {env['WORLD_SIZE']}")


def environment(env: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that change what a run does, and combinations that are known to be bad."""
    for variable in TIMES:
        if variable in env:
            try:
                seconds(variable)
                yield Finding(variable, env[variable])
            except ConfigError as error:
                yield Finding(variable, env[variable], "bad", str(error).splitlines()[-1].strip())
    for name, bad in _CONFLICTS.items():
        value = env.get(f"PARALLELISM_CONFIG_{name}", "")
        if value.isdigit() and int(value) > 1:
            yield Finding(f"PARALLELISM_CONFIG_{name}", value, "bad", bad)
    if env.get("ACCELERATE_USE_FSDP") == "true" or env.get("ACCELERATE_USE_DEEPSPEED") == "true":
        yield Finding(
            "accelerate's FSDP or DeepSpeed plugin",
            "on",
            "bad",
            "parallelize(dp_shard=...) applies FSDP2 itself: leave the plugin out of the YAML",
        )
    gpus = torch.cuda.is_available()
    threads, cores = env.get("OMP_NUM_THREADS", ""), os.cpu_count() or 1
    ranks = int(env.get("LOCAL_WORLD_SIZE", "1"))
    if not gpus and ranks * (int(threads) if threads.isdigit() else cores) > cores:
        found = f"{threads or 'not set'}, {ranks} ranks on {cores} cores"
        yield Finding("OMP_NUM_THREADS", found, "note", f"OMP_NUM_THREADS={max(1, cores // ranks)}")
    if gpus and env.get("CUDA_LAUNCH_BLOCKING") == "1":
        yield Finding("CUDA_LAUNCH_BLOCKING", "1", "note", "unset it: nothing overlaps with it")
    if gpus and env.get("NCCL_P2P_DISABLE") == "1":
        yield Finding("NCCL_P2P_DISABLE", "1", "note", "unset it, unless direct access is broken")
    if gpus and "expandable_segments" not in env.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        remedy = (
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True where lengths differ: less is lost"
        )
        yield Finding("PYTORCH_CUDA_ALLOC_CONF", "not set", "ok", remedy)
    if env.get("TOKENIZERS_PARALLELISM") is None and gpus:
        yield Finding("TOKENIZERS_PARALLELISM", "not set", "ok", "false, where loaders fork")


_CONFLICTS = {
    "SP_SIZE": "that is DeepSpeed Ulysses: parallelism_config_tp_size, and parallelize(sp=True)",
    "CP_SIZE": "that is accelerate's own ring: parallelism_config_cp_size: 1, parallelize(cp=...)",
}
