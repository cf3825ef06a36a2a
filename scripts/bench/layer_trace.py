"""How long a GPU works, of the time that a step takes: one rank of a fake world of 8, on one GPU.

Four layers of Llama-3.1-8B and of Mixtral-8x7B in bfloat16, forward and backward, with the real
kernels; the fake world's collectives return at once, so that what is left is this rank's own work.
Where busy is much less than the wall time, the host cannot launch fast enough. Rows beside hf_sp's
show what a part costs: norms without Triton, a length that tp does not divide, LoRA with and
without dropout. Rounds are interleaved; a figure is the median over rounds.

    python scripts/bench/layer_trace.py           # on a GPU; writes scripts/bench/results/
    python scripts/bench/layer_trace.py --quick   # small shapes, on a CPU too; writes nothing
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

# Not this folder: transformers looks for a package called `kernels`, and would find kernels.py.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import peft
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from hf_sp import parallelize
from hf_sp.estimate import fake_world

RESULTS = Path(__file__).resolve().parent / "results"
TP = 8
LAYERS = 4
WARM_UP = 10  # the first 8 forwards of hf_sp compare their inputs over the ranks
LENGTHS = (2048, 8192)
DENSE = {"hidden_size": 4096, "intermediate_size": 14336}
SMALL = {"hidden_size": 128, "intermediate_size": 256}


@dataclass(frozen=True, slots=True)
class Contender:
    """A model, and what is done to it."""

    title: str
    sparse: bool = False
    parallel: bool = True
    kernels: bool = True
    longer: int = 0
    lora_dropout: float | None = None


CONTENDERS = (
    Contender("dense, plain HF", parallel=False),
    Contender("dense"),
    Contender("dense, kernels=False", kernels=False),
    Contender("dense, S + 1", longer=1),
    Contender("dense, LoRA", lora_dropout=0.0),
    Contender("dense, LoRA, dropout", lora_dropout=0.05),
    Contender("sparse, plain HF", sparse=True, parallel=False),
    Contender("sparse", sparse=True),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the results: milliseconds of a step; busy is None without a GPU."""

    title: str
    seq: int
    wall_ms: float
    busy_ms: float | None


def make_config(sparse: bool, small: bool) -> PreTrainedConfig:
    """The config of a model of four layers whose embedding and head cost next to nothing."""
    shape = SMALL if small else DENSE
    shared = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": LAYERS}
    kind = MixtralConfig if sparse else LlamaConfig
    return kind(**shape, **shared, vocab_size=256, max_position_embeddings=16384, use_cache=False)


def step_of(
    contender: Contender, seq: int, small: bool, device: torch.device
) -> Callable[[], None]:
    """A step of the contender: forward and backward, without an optimizer."""
    with device:
        config = make_config(contender.sparse, small)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.train()
    if contender.parallel:
        mesh = init_device_mesh(device.type, (TP,), mesh_dim_names=("tp",))
        model = parallelize(model, mesh=mesh, kernels=contender.kernels)
    if contender.lora_dropout is not None:
        how = peft.LoraConfig(
            r=16,
            target_modules="all-linear",
            lora_dropout=contender.lora_dropout,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, how)
        model.enable_input_require_grads()
    ids = torch.zeros(1, seq + contender.longer, dtype=torch.long, device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def wall_ms(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds until the device has finished a step."""
    _wait(device)
    started = time.perf_counter()
    step()
    _wait(device)
    return 1e3 * (time.perf_counter() - started)


def busy_ms(step: Callable[[], None], device: torch.device) -> float | None:
    """Milliseconds in which at least one kernel of a step ran."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        _wait(device)
    spans = [(e.time_range.start, e.time_range.end) for e in trace.events()]
    return union(spans) / 1e3


def union(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the line these spans cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(seq: int, rounds: int, small: bool) -> list[Row]:
    """All contenders at one length, in turn, round after round."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with fake_world(TP):
        steps = {c.title: step_of(c, seq, small, device) for c in CONTENDERS}
        for step in track(steps.values(), f"S={seq}: warm-up", console=Console(stderr=True)):
            for _ in range(WARM_UP):
                step()
        found: dict[str, list[tuple[float, float | None]]] = {title: [] for title in steps}
        for _ in track(range(rounds), f"S={seq}", console=Console(stderr=True)):
            for title, step in steps.items():
                found[title].append((wall_ms(step, device), busy_ms(step, device)))
    rows = []
    for title, times in found.items():
        busy = [b for _, b in times if b is not None]
        rows.append(Row(title, seq, median(w for w, _ in times), median(busy) if busy else None))
    return rows


def cells(row: Row) -> tuple[str, ...]:
    """A row as text."""
    busy = "not measured" if row.busy_ms is None else f"{row.busy_ms:.2f}"
    share = "-" if row.busy_ms is None else f"{row.busy_ms / row.wall_ms:.2f}"
    return row.title, str(row.seq), f"{row.wall_ms:.2f}", busy, share


HEADER = ("four layers", "S", "wall ms", "GPU busy ms", "busy / wall")


def write_results(rows: list[Row], folder: Path) -> None:
    """Write layer_trace.md."""
    lines = ["# How long a GPU works, of the time that a step takes", ""]
    lines.append(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers ")
    lines.append(f"{transformers.__version__}, Python {platform.python_version()}, ")
    lines.append(f"{datetime.now(UTC):%Y-%m-%d}. Made by `python scripts/bench/layer_trace.py`.\n")
    lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    (folder / "layer_trace.md").write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes; writes nothing")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    if not options.quick and not torch.cuda.is_available():
        parser.error("no GPU: --quick runs small shapes on a CPU, to see that it runs")
    lengths = (64,) if options.quick else LENGTHS
    rows = [row for seq in lengths for row in measure(seq, options.rounds, options.quick)]
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*cells(row))
    Console().print(table)
    if not options.quick:
        write_results(rows, RESULTS)


if __name__ == "__main__":
    main()
