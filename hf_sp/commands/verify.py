"""Can I trust it: loss, logits and every gradient on tp ranks of this machine, against one process.

The ranks are started here, on GPUs if there are as many, else on the CPU; nothing is downloaded. A
config without weights gets random ones. Where the whole has no room it is compared layer by layer
(`--by-layer` in any case). `--layers 2` verifies the same layers of a smaller model.

    hf-sp verify ./my-model --tp 2
    hf-sp verify meta-llama/Llama-3.1-8B --tp 4 --layers 2
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.multiprocessing.spawn import spawn
from transformers import PreTrainedConfig

from hf_sp.api import supports
from hf_sp.commands.rank import with_layers
from hf_sp.errors import ConfigError, HfSpError, PlanError
from hf_sp.loading import load_config
from hf_sp.proof.found import Verification
from hf_sp.proof.pieces import Source
from hf_sp.proof.verify import DTYPES, verify

NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("name", metavar="NAME", help="folder, config.json, or cached name")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--no-sp", dest="sp", action="store_false")
    parser.add_argument("--no-kernels", dest="kernels", action="store_false")
    parser.add_argument("--seq", type=int, default=33, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=2, help="rows; the second is padded")
    parser.add_argument("--layers", type=int, metavar="N", help="of the first N layers alone")
    parser.add_argument("--dtype", choices=NAMES, default="float64")
    parser.add_argument("--by-layer", action="store_const", const=True, help="one at a time")
    parser.add_argument("--random", action="store_true", help="random weights in any case")


def run(options: argparse.Namespace) -> None:
    """The command; status 1 if anything disagrees."""
    config = load_config(options.name)
    check(config, options)
    with tempfile.TemporaryDirectory() as folder:
        gpus = torch.cuda.is_available() and torch.cuda.device_count() >= options.tp
        arguments = (folder, "nccl" if gpus else "gloo", options)
        spawn(_rank, arguments, nprocs=options.tp)
        found = pickle.loads((Path(folder) / "found").read_bytes())
    if isinstance(found, HfSpError):
        raise found
    if options.json:
        answer = {"name": options.name, "weights": weights(options), **found.as_data()}
        sys.stdout.write(json.dumps(answer, indent=1) + "\n")
    else:
        show(f"{options.name} ({weights(options)} weights)", found)
    sys.exit(0 if found else 1)


def check(config: PreTrainedConfig, options: argparse.Namespace) -> None:
    """Refuse before any rank is started.

    Raises:
        ConfigError: more layers than there are.
        PlanError: the model is not supported.
    """
    layers = config.get_text_config().num_hidden_layers
    if (options.layers or 1) > layers:
        raise ConfigError(
            "the model has fewer layers",
            where="--layers",
            got=str(options.layers),
            legal=f"--layers 1 to {layers}",
        )
    if not (found := supports(config, options.tp, options.sp, ep=options.ep)):
        raise PlanError(f"the model is not supported\n{found.reason}")


def has_weights(name: str) -> bool:
    """Whether a folder or a cached name has any."""
    ends = ("", ".index.json")
    files = [f"{file}{end}" for file in ("model.safetensors", "pytorch_model.bin") for end in ends]
    if Path(name).exists():
        return any((Path(name) / file).exists() for file in files)
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def source(config: PreTrainedConfig, options: Any) -> Source:
    """The model's weights where they are at hand, else random ones."""
    if options.layers:
        config = with_layers(config, options.layers)
    name = options.name if weights(options) == "its own" else None
    return Source(config, name, dtype=NAMES[options.dtype])


def weights(options: Any) -> str:
    """Whose the model will have."""
    return "random" if options.random or not has_weights(options.name) else "its own"


def _rank(rank: int, folder: str, backend: str, options: argparse.Namespace) -> None:
    """One rank. What it refuses is handed back; any other error ends all with its traceback."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.tp))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=options.tp)
    config = load_config(options.name)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        config.get_text_config().vocab_size, (options.batch, options.seq), generator=generator
    )
    labels, mask = ids.clone(), torch.ones_like(ids)
    if options.batch > 1 and options.seq > 4:
        mask[1, : options.seq // 4] = 0
        labels[mask == 0] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found: Any
    status = Console(stderr=True, quiet=rank > 0).status("comparing")
    try:
        with status:
            found = verify(
                source(config, options),
                batch,
                tp=options.tp,
                sp=options.sp,
                dtype=NAMES[options.dtype],
                layers=options.by_layer,
                told=status.update,
                ep=options.ep,
                kernels=options.kernels,
            )
    except HfSpError as error:
        found = error
    if rank == 0:
        (Path(folder) / "found").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def show(name: str, found: Verification) -> None:
    """Print the verdict and the worst comparisons."""
    console = Console()
    shown = Table(title=f"{name} on {found.tp} ranks, sp={found.sp}, {found.dtype}")
    for head in ("error", "of", "what"):
        shown.add_column(head, justify="left" if head == "what" else "right")
    rows = found.wrong or found.rows
    for row in rows[:12]:
        style = "red" if found.wrong else None
        shown.add_row(f"{row.error:.1e}", f"{row.scale:.1e}", escape(row.what), style=style)
    console.print(shown)
    for problem in found.problems:
        console.print(f"[red]{escape(problem)}[/red]", highlight=False)
    if found.changed:
        console.print(f"Dropout was set to zero in {len(found.changed)} places.")
    console.print(f"Collectives of a step: {found.collectives}.", highlight=False)
    for what in found.unseen:
        console.print(f"Not shown layer by layer: {what}.", highlight=False)
    verdict = "[green]agrees[/green]" if found else "[red]DOES NOT AGREE[/red]"
    console.print(
        f"{verdict}: {len(found.rows)} comparisons, {len(found.wrong)} beyond what rounding "
        f"explains, {found.tolerance:.0e} ({found.why})",
        highlight=False,
    )
