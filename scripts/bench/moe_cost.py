"""What the experts of one sparse layer cost a rank: features split (tp) or whole experts (ep).

Bytes alive after the forward and bytes sent in a training step, for Mixtral-8x7B and
Qwen3-30B-A3B: whole layers, counted with the code itself on fake tensors, beside the closed form
of their experts. Where tokens travel, how many do depends on the data, and fake tensors have none:
they stand for an even router. tests/sparse holds the same forms to the byte on real ranks.

    python scripts/bench/moe_cost.py            # writes scripts/bench/results/moe_cost.md
    python scripts/bench/moe_cost.py --quick    # one shape, writes nothing
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

# Not this folder: see step_cost.py.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import transformers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_sp.estimate import StepCount, count_step, fake_tensors, fake_world, per_layer
from scripts.bench._cost.experts import (
    ExpertsShape,
    experts_weight_bytes,
    fsdp_experts_moved,
    split_experts_bytes_per_token,
    split_experts_moved_per_token,
    travelling_experts_bytes_per_token,
    travelling_experts_moved_per_token,
)
from scripts.bench._cost.layers import LayerShape

RESULTS = Path(__file__).resolve().parent / "results"
ATTENTION = "sdpa_without_mask"
MIB = 2**20
SEQ = 8192

MIXTRAL = ExpertsShape(4096, 14336, experts=8, choices=2, routing_weight=4, normalized=True)
QWEN = ExpertsShape(2048, 768, experts=128, choices=8, normalized=True)
SHAPES = {"Mixtral-8x7B": MIXTRAL, "Qwen3-30B-A3B": QWEN}
ATTENTIONS = {
    "Mixtral-8x7B": LayerShape(4096, 14336, heads=32, kv_heads=8, head_dim=128),
    "Qwen3-30B-A3B": LayerShape(2048, 768, heads=32, kv_heads=4, head_dim=128),
}
CASES = [(name, tp) for name in SHAPES for tp in (2, 4, 8)]
GROUPS = [
    ("Mixtral-8x7B", 2, 4),
    ("Mixtral-8x7B", 4, 2),
    ("Qwen3-30B-A3B", 2, 16),
    ("Qwen3-30B-A3B", 8, 4),
]

HEADER = ("shape", "ranks", "experts", "alive MiB", "sent MiB", "sent / split", "layer alive MiB")
NOTES = f"""\
Per rank and sparse layer, bfloat16, B = 1, S = {SEQ}. `alive` and `sent` are the experts and their
router alone, in closed form (`scripts/bench/_cost/experts.py`): what they keep for backward, and
what a rank sends in a step. `split` has a part of every expert's features on each rank and gathers
all tokens; `whole` has E / ep experts on each rank, and each token travels to its k experts (an
even router). `layer alive` is the whole layer, counted with the code on fake tensors, which stand
for an even router; attention and norms are in it.

Whole experts send k / ep of what gathering sends: Mixtral's k = 2 wins from 4 ranks on and draws at
2, Qwen3's k = 8 draws at 8 and loses below. What is kept for backward is the same for an even
router but for the router's own tensors, which every rank keeps for all tokens where features are
split. Against a skewed router `split` is safe: its work and memory do not depend on the routing,
while the rank of a crowded expert keeps and computes as many rows as it is sent.
"""

GROUPS_HEADER = (
    "shape",
    "tp x dp_shard",
    "ep",
    "tokens sent MiB",
    "weights sent MiB",
    "weights at once MiB",
)
GROUPS_NOTES = f"""\

## With data parallel groups beside tp

Each group has a batch of {SEQ} tokens. Up to ep = tp the experts are in FSDP's hands, which sends
their weights three times a micro-batch (two gathers, one reduce-scatter) and has 1 / tp of them
whole while a layer runs; with ep = tp * dp_shard tokens travel among all ranks, and no weight does.
Closed form, an even router.

Tokens' bytes grow with the batch and with k / tp; weights' do not. So ep = tp * dp_shard wins up to
a batch of (weights sent) / (tokens sent more) times the one here: for Qwen3 at tp 2 three times
over features split, at tp 8 more than twenty times; for Mixtral at tp 4 always, as its tokens'
bytes are fewer, too.
"""


def config_of(name: str, layers: int) -> PreTrainedConfig:
    """Make the configuration of a model of `layers` such layers."""
    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    common = {
        "num_hidden_layers": layers,
        "vocab_size": 256,
        "max_position_embeddings": SEQ,
        "attn_implementation": ATTENTION,
        "num_attention_heads": ATTENTIONS[name].heads,
        "num_key_value_heads": ATTENTIONS[name].kv_heads,
        "head_dim": ATTENTIONS[name].head_dim,
    }
    if name == "Mixtral-8x7B":
        return MixtralConfig(sliding_window=None, **common)
    return Qwen3MoeConfig(
        hidden_size=QWEN.hidden,
        moe_intermediate_size=QWEN.intermediate,
        num_experts=QWEN.experts,
        num_experts_per_tok=QWEN.choices,
        norm_topk_prob=True,
        **common,
    )


def count(name: str, tp: int, layers: int, ep: int) -> StepCount:
    """Count one step as rank 0 of tp ranks."""
    from hf_sp import parallelize

    with fake_world(tp) as mesh, fake_tensors(torch.bfloat16):
        model = AutoModelForCausalLM.from_config(config_of(name, layers)).train()
        model = parallelize(model, mesh=mesh, ep=ep)
        ids = torch.zeros(1, SEQ, dtype=torch.long)
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def count_layer(name: str, tp: int, ep: int) -> tuple[StepCount, StepCount]:
    """Count one layer, as what a third one adds; and the model of three."""
    two, three = (count(name, tp, layers, ep) for layers in (2, 3))
    return per_layer(two, three, 1), three


def layer_bytes_per_token(name: str, tp: int, ep: int) -> float:
    """What a whole layer keeps, closed form: (4h + 8)/t, attention, experts and router."""
    shape = SHAPES[name]
    # A rank has a key/value head at least.
    attention = replace(ATTENTIONS[name], kv_heads=max(ATTENTIONS[name].kv_heads, tp))
    experts = split_experts_bytes_per_token if ep == 1 else travelling_experts_bytes_per_token
    kept = (4 * shape.hidden + 8) / tp + attention.attention_bytes(tp) + experts(shape, tp)
    if name == "Qwen3-30B-A3B":
        # Norms of q and k: their inputs in 16 bit and a float32 statistic a head.
        q, k = attention.heads, attention.kv_heads
        kept += (2 * attention.head_dim + 4) * (q + k) / tp
    return kept


def rows(name: str, tp: int) -> list[tuple[str, ...]]:
    """Two lines of the table."""
    shape = SHAPES[name]
    split = split_experts_moved_per_token(shape, tp)
    out = []
    for kind, ep, alive, sent in (
        ("split", 1, split_experts_bytes_per_token(shape, tp), split),
        (
            "whole",
            tp,
            travelling_experts_bytes_per_token(shape, tp),
            travelling_experts_moved_per_token(shape, tp),
        ),
    ):
        layer, _ = count_layer(name, tp, ep)
        numbers = (f"{alive * SEQ / MIB:.1f}", f"{sent * SEQ / MIB:.1f}", f"{sent / split:.3f}")
        out.append((name, str(tp), kind, *numbers, f"{layer.alive_bytes / MIB:.1f}"))
    return out


def groups(name: str, tp: int, dp_shard: int) -> list[tuple[str, ...]]:
    """Three lines of the second table."""
    shape = SHAPES[name]
    weights = experts_weight_bytes(shape)
    fsdp = fsdp_experts_moved(shape, tp, dp_shard)
    out = []
    for ep, tokens, sent, ranks in (
        (1, split_experts_moved_per_token(shape, tp), fsdp, tp),
        (tp, travelling_experts_moved_per_token(shape, tp), fsdp, tp),
        (
            tp * dp_shard,
            travelling_experts_moved_per_token(shape, tp, tp * dp_shard),
            0.0,
            tp * dp_shard,
        ),
    ):
        if shape.experts % ep:
            continue  # no rank has a part of an expert there
        numbers = (tokens * SEQ, sent, weights / ranks)
        mib = (f"{number / MIB:.1f}" for number in numbers)
        out.append((name, f"{tp} x {dp_shard}", str(ep), *mib))
    return out


def lines(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the markdown")
    options = parser.parse_args()
    cases = CASES[:1] if options.quick else CASES
    table = lines(HEADER, [row for case in cases for row in rows(*case)])
    beside = lines(GROUPS_HEADER, [row for case in GROUPS for row in groups(*case)])
    print("\n".join([*table, GROUPS_NOTES, *beside]))
    if not options.quick:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}."
        made = "Made by `python scripts/bench/moe_cost.py`.\n"
        title = "# The cost of a sparse layer's experts\n"
        text = "\n".join([title, NOTES, versions, made, *table, GROUPS_NOTES, *beside, ""])
        (options.out / "moe_cost.md").write_text(text)


if __name__ == "__main__":
    main()
