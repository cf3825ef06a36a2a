"""One rank on one GPU: peak memory and compute time of rank 0 of a tp=8 world that is not there.

Layers of Llama-3.1-8B and 70B in bfloat16, forward and backward, with the real kernels; the
fake world's collectives return at once. Three contenders: one GPU's plain model, transformers' own
TP, hf_sp. Beside the measured peak stands the predicted one, which `hf_sp.estimate` counts under
fake tensors; both are above the weights. Times are of this rank's own work: nothing is sent.

    python scripts/bench/gpu_rank.py           # on a GPU; writes scripts/bench/results/
    python scripts/bench/gpu_rank.py --quick   # a small shape, on a CPU too; writes nothing
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

# Not this folder: transformers looks for a package called `kernels`, and would find kernels.py.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaForCausalLM

from hf_sp.estimate import fake_world
from scripts.bench.layer_trace import wall_ms
from scripts.bench.step_cost import LAYOUTS, SHAPES, count_model, make_config

RESULTS = Path(__file__).resolve().parent / "results"
TP, LAYERS, WARM_UP = 8, 2, 10
CONTENDERS = {
    "one GPU": "unsharded",
    "transformers' own TP": "HF native TP",
    "hf_sp": "hf_sp sp=True",
}
CASES = (("Llama-3.1-8B", 8192), ("Llama-3.1-8B", 32768), ("Llama-3.1-70B", 8192))
QUICK = (("small", 64),)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the results; measured is None without a GPU."""

    shape: str
    seq: int
    title: str
    predicted: int
    measured: int | None
    wall_ms: float


def measure(shape: str, seq: int, title: str, rounds: int) -> Row:
    """Predict one contender, and run it."""
    layout = LAYOUTS[CONTENDERS[title]][0]
    config = make_config(SHAPES[shape], seq, LAYERS)
    predicted = count_model(config, TP, seq, layout).peak_bytes
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with fake_world(TP):
        mesh = init_device_mesh(device.type, (TP,), mesh_dim_names=("tp",))
        apply = layout(mesh)
        with device:
            model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model = apply(model).train()
        ids = torch.zeros(1, seq, dtype=torch.long, device=device)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        for _ in range(WARM_UP):
            step()
            model.zero_grad(set_to_none=True)
        measured = peak_of(step) if device.type == "cuda" else None
        times = []
        for _ in range(rounds):
            model.zero_grad(set_to_none=True)
            times.append(wall_ms(step, device))
    return Row(shape, seq, title, predicted, measured, median(times))


def peak_of(step) -> int:
    """Bytes that a step allocates at most, above what there is before it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


HEADER = ("shape", "S", f"{LAYERS} layers", "predicted MiB", "measured MiB", "/ predicted", "ms")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    predicted = f"{row.predicted / 2**20:.1f}"
    if row.measured is None:
        peak, ratio = "not measured", "-"
    else:
        peak, ratio = f"{row.measured / 2**20:.1f}", f"{row.measured / row.predicted:.3f}"
    return row.shape, str(row.seq), row.title, predicted, peak, ratio, f"{row.wall_ms:.2f}"


def write_results(rows: list[Row], folder: Path) -> None:
    """Write gpu_rank.md."""
    lines = ["# One rank of a tp=8 world, on one GPU", ""]
    lines.append(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers ")
    lines.append(f"{transformers.__version__}, Python {platform.python_version()}, ")
    lines.append(f"{datetime.now(UTC):%Y-%m-%d}. Made by `python scripts/bench/gpu_rank.py`.\n")
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    (folder / "gpu_rank.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small shape; writes nothing")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    if not options.quick and not torch.cuda.is_available():
        parser.error("no GPU: --quick runs a small shape on a CPU, to see that it runs")
    jobs = [(*case, title) for case in (QUICK if options.quick else CASES) for title in CONTENDERS]
    console = Console(stderr=True)
    rows = [measure(*job, options.rounds) for job in track(jobs, "measuring", console=console)]
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=120).print(table)
    if not options.quick:
        write_results(rows, RESULTS)


if __name__ == "__main__":
    main()
