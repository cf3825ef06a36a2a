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
from hf_sp.commands.rank import Run, count, layer_collectives, longest

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
    print("| model | tp | cp | GiB at the peak | in | MiB moved a layer | longest row |")
    print("|---|---|---|---|---|---|---|")
    for name in options.models:
        for tp in (n for n in range(1, options.gpus + 1) if options.gpus % n == 0):
            print(row(name, Run(tp=tp, cp=options.gpus // tp, seq=options.tokens), options.gpu))


def row(name: str, run: Run, gpu: str) -> str:
    """A split's line of the table."""
    config, run = MODELS[name], replace(run, checkpointing=True)
    found, capacity = count(config, run), capacity_of(gpu)
    moved = sum(
        c.bytes for kinds in layer_collectives(config, run).values() for c in kinds.values()
    )
    most = longest(config, run, capacity) if capacity else 0
    cells = [name, run.tp, run.cp, f"{found.peak / GIB:.1f}", found.when, f"{moved / 2**20:,.0f}"]
    return "| " + " | ".join(map(str, [*cells, f"{most:,}" if most else "none fits"])) + " |"


if __name__ == "__main__":
    main()
