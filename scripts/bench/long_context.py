"""Long sequences: bytes on a GPU and bytes moved against tokens, for splits of a node's GPUs.

One rank of the run is counted by the training code itself on fake tensors: no GPU, no weights.
Layers are checkpointed, weights, gradients and AdamW's state in bfloat16 as the model is.

    python scripts/bench/long_context.py                  # the table of docs/long-context.md
    python scripts/bench/long_context.py --tokens 262144 --models llama-8b
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from hf_sp.commands.estimate import capacity_of
from hf_sp.commands.rank import Run, count, with_layers

GIB = 2**30


def _sizes(hidden: int, features: int, layers: int, heads: int, vocab: int) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "intermediate_size": features, "num_hidden_layers": layers}
    more = {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": vocab}
    return {**sizes, **more, "max_position_embeddings": 2**24}


MODELS: dict[str, PreTrainedConfig] = {
    "llama-8b": LlamaConfig(**_sizes(4096, 14336, 32, 32, 128256)),
    "qwen3-8b": Qwen3Config(**_sizes(4096, 12288, 36, 32, 151936)),
    "llama-70b": LlamaConfig(**_sizes(8192, 28672, 80, 64, 128256)),
}


def main() -> None:
    """Print a row for each model and split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--tokens", type=int, default=2**18)
    options = parser.parse_args()
    print("| model | tp | cp | GiB at the peak | MiB moved a layer | longest row |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.models:
        for tp in (n for n in range(1, options.gpus + 1) if options.gpus % n == 0):
            run = Run(tp=tp, cp=options.gpus // tp, seq=options.tokens)
            print(row(name, run, options.gpu), flush=True)


def row(name: str, run: Run, gpu: str) -> str:
    """A split's line of the table.

    Peaks are lines in the number of layers and in that of tokens: each through two counts.
    """
    config, run = MODELS[name], replace(run, checkpointing=True)
    peak, moved = at(config, run)
    slope = (at(config, replace(run, seq=2 * run.seq))[0] - peak) / run.seq
    room, step = (capacity_of(gpu) or 0) - peak, 1024 * run.tp * run.cp
    most = max(0, int((run.seq + room / slope) // step * step))
    cells = [name, run.tp, run.cp, f"{peak / GIB:.1f}", f"{moved / 2**20:,.0f}", f"{most:,}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def at(config: PreTrainedConfig, run: Run) -> tuple[int, int]:
    """Bytes at the peak, and bytes that a layer moves in a step."""
    few = [count(with_layers(config, n), run) for n in (2, 3)]
    two, three = (
        sum(c.bytes for kinds in one.collectives.values() for c in kinds.values()) for one in few
    )
    layers = config.num_hidden_layers
    return few[0].peak + (layers - 2) * (few[1].peak - few[0].peak), three - two


if __name__ == "__main__":
    main()
