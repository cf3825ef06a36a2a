"""Memory of a rank while a model is loaded: hf_sp's ``from_pretrained`` beside the ways without it.

Anonymous memory (``RssAnon``), sampled every millisecond from before the load to its end. Mapped
pages of the checkpoint's files are not in it: the system reads them again when it wants the memory.
``tests/loading`` counts the same to the byte, without what malloc keeps.

    python scripts/bench/load_memory.py            # writes scripts/bench/results/load_memory.md
    python scripts/bench/load_memory.py --quick    # the first model, a tenth of the size
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# Not this folder: transformers looks for a package called `kernels`, and would find kernels.py.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import transformers
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

RESULTS = Path(__file__).with_name("results") / "load_memory.md"
MIB = 2**20
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    | {"vocab_size": 32000, **HEADS},
    "qwen3_moe": {"hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 4}
    | {"num_experts": 16, "num_experts_per_tok": 2, "vocab_size": 8192, "head_dim": 64, **HEADS},
}
# (model, dtype to load in; the files are float32, degrees)
CASES: list[tuple[str, str, dict[str, int]]] = [
    ("llama", "float32", {"tp": 2}),
    ("llama", "bfloat16", {"tp": 2}),
    ("llama", "bfloat16", {"tp": 1, "dp_shard": 2}),
    ("qwen3_moe", "float32", {"tp": 2}),
    ("qwen3_moe", "bfloat16", {"tp": 2}),
    ("qwen3_moe", "bfloat16", {"tp": 2, "ep": 2}),
    ("qwen3_moe", "bfloat16", {"tp": 1, "dp_shard": 2}),
]
WAYS = ("hf_sp.from_pretrained", "parallelize(from_pretrained)", "from_pretrained, no ranks")


def write_model(name: str, folder: Path, smaller: int) -> None:
    """A checkpoint in float32, in files of 100 MB."""
    fields = dict(CONFIGS[name])
    fields["vocab_size"] = max(64, fields["vocab_size"] // smaller)
    if smaller > 100:
        fields |= {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    fields["num_hidden_layers"] = max(1, fields["num_hidden_layers"] // smaller)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields))
    model.float().save_pretrained(folder, max_shard_size="100MB")


def _anonymous() -> int:
    """Bytes of this process that no file backs."""
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """Samples in a thread while it is entered."""

    def __enter__(self) -> Peak:
        gc.collect()
        self.before = self.peak = _anonymous()
        self.going = True
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while self.going:
            self.peak = max(self.peak, _anonymous())
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self.going = False
        self.thread.join()


def load(way: int, folder: str, dtype: str, degrees: dict[str, int]) -> dict[str, float]:
    """On a rank: what loading takes at most, and what stays, in MiB."""
    from hf_sp import from_pretrained, parallelize
    from hf_sp.comm.mesh import start_distributed

    torch.set_num_threads(1)
    disable_progress_bar()
    kwargs = {"dtype": getattr(torch, dtype)}
    if way < 2:
        start_distributed()

    def make(path: str) -> Any:
        if way == 0:
            return from_pretrained(path, **degrees, **kwargs)
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        return parallelize(model, **degrees) if way == 1 else model

    # Code that is imported when it is first needed: 60 MiB of torch's.
    make(f"{folder}-small")
    with Peak() as memory:
        model = make(folder)
    local = [p.to_local() if way < 2 else p for p in model.parameters()]
    return {
        "peak": (memory.peak - memory.before) / MIB,
        "shard": sum(p.nbytes for p in local) / MIB,
        "largest": max(p.numel() * p.element_size() for p in model.parameters()) / MIB,
    }


def launch(way: int, *what: str) -> dict[str, float]:
    """The rank that takes most, of one or two fresh processes."""
    world = 2 if way < 2 else 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": str(world)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--rank", str(way), *what]
    ranks = [
        subprocess.Popen(command, env=common | {"RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(world)
    ]
    told = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed")
    return max((json.loads(text.splitlines()[-1]) for text in told), key=lambda one: one["peak"])


def table(cases: list[tuple[str, str, dict[str, int]]], smaller: int) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| model, in float32 files | loaded in | degrees | shard | largest weight | bar | "
        + " | ".join(WAYS)
        + " |",
        "|---|---|---|" + "---:|" * 6,
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, dtype, degrees in cases:
            path = Path(folder) / name
            if not path.exists():
                write_model(name, path, smaller)
                write_model(name, Path(f"{path}-small"), 1000)
            found = [launch(w, str(path), dtype, json.dumps(degrees)) for w in range(len(WAYS))]
            ours = found[0]
            bar = 1.1 * (ours["shard"] + ours["largest"])
            numbers = (ours["shard"], ours["largest"], bar, *(one["peak"] for one in found))
            asked = ", ".join(f"{k}={v}" for k, v in degrees.items())
            cells = " | ".join(f"{x:.0f}" for x in numbers)
            lines.append(f"| {name} | {dtype} | {asked} | {cells} |")
            Console().print(lines[-1])
    return lines


def main() -> None:
    """Measure and write, or be a rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        way, folder, dtype, degrees = args.rank
        sys.stdout.write(json.dumps(load(int(way), folder, dtype, json.loads(degrees))) + "\n")
        return
    lines = table(CASES[:1] if args.quick else CASES, 8 if args.quick else 1)
    if not args.quick:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        head = [
            "# Memory of a rank that loads",
            "",
            f"`python scripts/bench/load_memory.py`; {versions}, two ranks on a CPU, gloo.",
            "",
            "MiB of anonymous memory: the most while the model is loaded, beyond what the process",
            "had before; of the rank that takes more. Bar: shard + largest weight + 10 %. The last",
            "column is one process that loads the whole model.",
            "",
        ]
        RESULTS.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
