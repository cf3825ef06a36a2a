"""What one decoder layer costs a rank in a training step, counted and not timed.

For each shape and tp: bytes alive after the forward, peak live bytes, collectives and their
payload, of the unsharded model, transformers' own TP, torch's DTensor TP + SequenceParallel, and
hf_sp along its memory frontier, side by side with the closed form.

A row is what a third layer adds to a model of two, so that embedding, head and loss drop out; the
first layer's peak may differ by a buffer. The models are whole LlamaForCausalLMs in bfloat16, run
as rank 0 of a fake world on fake tensors: no GPU, no memory, the same numbers on every machine. At
the end Mixtral and Qwen3-MoE, with experts split by features and whole (an even router); what of
it is the experts' and when which wins is in moe_cost.py.

    python scripts/bench/step_cost.py            # all shapes, writes scripts/bench/results/
    python scripts/bench/step_cost.py --quick    # the small shape at tp 2, writes nothing
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

# Not this folder: transformers looks for a package called `kernels`, and would find kernels.py.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_sp.estimate import (
    CollectiveCount,
    StepCount,
    count_step,
    fake_tensors,
    fake_world,
    per_layer,
)
from scripts.bench import moe_cost
from scripts.bench._cost.layers import (
    LayerShape,
    kernels_bytes_per_token,
    kernels_tp_bytes_per_token,
    sp_gathered_bytes_per_token,
    sp_shard_bytes_per_token,
    tp_bytes_per_token,
)

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20

# The same SDPA under a name that transformers makes no mask for: see fake_tensors().
ATTENTION = "sdpa_without_mask"

SHAPES: dict[str, LayerShape] = {
    "small": LayerShape(hidden=512, intermediate=1792, heads=8, kv_heads=8, head_dim=64),
    "Llama-3.1-8B": LayerShape(4096, 14336, heads=32, kv_heads=8, head_dim=128),
    "Llama-3.1-70B": LayerShape(8192, 28672, heads=64, kv_heads=8, head_dim=128),
}
# (shape, tp, S)
CASES: tuple[tuple[str, int, int], ...] = (
    ("small", 2, 1024),
    ("small", 4, 1024),
    ("Llama-3.1-8B", 8, 8192),
    ("Llama-3.1-70B", 8, 8192),
)
SPARSE_CASES: tuple[tuple[str, int, int], ...] = tuple(
    (name, 8, moe_cost.SEQ) for name in moe_cost.SHAPES
)
QUICK: tuple[tuple[str, int, int], ...] = (("small", 2, 128),)

# What turns a plain model into a parallel one. In two steps, since meshes cannot be made on fake
# tensors: the first is called before them, the second on the model that was made of them.
Recompute = Literal["none", "norm", "norm+act"]
Apply = Callable[[LlamaForCausalLM], nn.Module]
Layout = Callable[[DeviceMesh], Apply]


def unsharded(mesh: DeviceMesh) -> Apply:
    """Leave the model as it is."""
    return lambda model: model


def hf_native(mesh: DeviceMesh) -> Apply:
    """Apply transformers' own TP, as from_pretrained(distributed_config=...) does."""
    # from_pretrained wants a checkpoint of that size on disk. These two are what it calls after
    # making the model on meta and before loading weights; undocumented, as of transformers 5.23.
    from transformers.distributed import DistributedConfig
    from transformers.distributed.utils import TransformersDeviceMesh

    tp = mesh.size()
    axes = ("pp", "dp_replicate", "fsdp", "tp")
    dense = init_device_mesh(mesh.device_type, (1, 1, 1, tp), mesh_dim_names=axes)
    meshes = TransformersDeviceMesh(dense, dense)  # the second is for experts, of which are none
    config = DistributedConfig(tp_size=tp)
    return lambda model: LlamaForCausalLM.maybe_distribute_model(model, config, meshes)


def dtensor_sp(mesh: DeviceMesh) -> Apply:
    """Apply torch's TP + SequenceParallel the way its tutorial does: one gather per block.

    Its norm weights are left with Partial gradients, so the all-reduce they need is not in its row.
    """

    seq, whole = Shard(1), Replicate()

    def apply(model: LlamaForCausalLM) -> nn.Module:
        plan: dict[str, ParallelStyle] = {
            "model.layers.0": PrepareModuleInput(
                input_layouts=(whole,), desired_input_layouts=(seq,), use_local_output=True
            ),
            "model.norm": SequenceParallel(),
            "lm_head": ColwiseParallel(input_layouts=seq, output_layouts=whole),
        }
        for i in range(model.config.num_hidden_layers):
            layer: dict[str, ParallelStyle] = {
                "input_layernorm": SequenceParallel(),
                "self_attn": PrepareModuleInput(
                    input_kwarg_layouts={"hidden_states": seq},
                    desired_input_kwarg_layouts={"hidden_states": whole},
                ),
                "self_attn.o_proj": RowwiseParallel(output_layouts=seq),
                "post_attention_layernorm": SequenceParallel(),
                "mlp": PrepareModuleInput(input_layouts=(seq,), desired_input_layouts=(whole,)),
                "mlp.down_proj": RowwiseParallel(output_layouts=seq),
            }
            columns = ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
            layer |= {f"{name}_proj": ColwiseParallel() for name in columns}
            plan |= {f"model.layers.{i}.{name}": style for name, style in layer.items()}
        return parallelize_module(model, mesh, plan)

    return apply


def hf_sp_layout(**options: Any) -> Layout:
    """Apply hf_sp."""

    def layout(mesh: DeviceMesh) -> Apply:
        from hf_sp import parallelize

        return lambda model: parallelize(model, mesh=mesh, **options)

    return layout


Formula = Callable[[LayerShape, int], float]


def _kernels(recompute: Recompute) -> Formula:
    return lambda shape, tp: kernels_bytes_per_token(shape, tp, recompute)


# With the closed form of what it keeps. recompute="none" keeps what Megatron keeps.
LAYOUTS: dict[str, tuple[Layout, Formula]] = {
    "unsharded": (unsharded, lambda shape, tp: tp_bytes_per_token(shape, 1)),
    "HF native TP": (hf_native, tp_bytes_per_token),
    "DTensor TP+SP": (dtensor_sp, sp_gathered_bytes_per_token),
    "hf_sp sp=False kernels=False": (hf_sp_layout(sp=False, kernels=False), tp_bytes_per_token),
    "hf_sp sp=False": (hf_sp_layout(sp=False), kernels_tp_bytes_per_token),
    "hf_sp sp=True kernels=False": (hf_sp_layout(kernels=False), sp_shard_bytes_per_token),
    "hf_sp sp=True recompute=none": (hf_sp_layout(recompute="none"), _kernels("none")),
    "hf_sp sp=True recompute=norm": (hf_sp_layout(recompute="norm"), _kernels("norm")),
    "hf_sp sp=True": (hf_sp_layout(), _kernels("norm+act")),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the results: a layer's cost on one rank."""

    shape: str
    tp: int
    seq: int
    layout: str
    alive_bytes: int
    bytes_per_token: float
    formula: float
    to_formula: float
    to_native: float | None
    peak_bytes: int
    peak_three_layers: int
    forward: str
    backward: str
    payload_bytes: int
    wire_bytes: int


def make_config(shape: LayerShape, seq: int, layers: int) -> LlamaConfig:
    """Make the config of a model of `layers` such layers."""
    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=layers,
        vocab_size=256,  # drops out; small keeps the logits out of the peak
        max_position_embeddings=seq,
        attn_implementation=ATTENTION,
    )


def count_model(config: LlamaConfig, tp: int, seq: int, layout: Layout) -> StepCount:
    """Count one step of a model, B = 1, as rank 0 of tp ranks."""
    with fake_world(tp) as mesh:
        apply = layout(mesh)
        with fake_tensors(torch.bfloat16):
            model = apply(LlamaForCausalLM(config)).train()
            ids = torch.zeros(1, seq, dtype=torch.long)
            return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def count_layer(shape: LayerShape, tp: int, seq: int, layout: Layout, base: int) -> list[StepCount]:
    """Count one layer, as what it adds to a model of `base` layers; and the larger model."""
    configs = (make_config(shape, seq, layers) for layers in (base, base + 1))
    small, large = (count_model(config, tp, seq, layout) for config in configs)
    return [per_layer(small, large), large]


def measure(case: tuple[str, int, int]) -> list[Row]:
    """Count every layout at one shape."""
    name, tp, seq = case
    shape = SHAPES[name]
    counts = {key: count_layer(shape, tp, seq, layout, 2) for key, (layout, _) in LAYOUTS.items()}
    native = counts["HF native TP"][0].alive_bytes
    rows = []
    for key, (layer, model) in counts.items():
        alive, formula = layer.alive_bytes, LAYOUTS[key][1](shape, tp)
        ratios = (round(alive / seq / formula, 4), round(alive / native, 4))
        peaks = (layer.peak_bytes, model.peak_bytes)
        wire = (spell(layer.forward), spell(layer.backward), layer.payload_bytes, layer.wire_bytes)
        rows.append(Row(name, tp, seq, key, alive, alive / seq, formula, *ratios, *peaks, *wire))
    return rows


def measure_sparse(case: tuple[str, int, int]) -> list[Row]:
    """Count a layer with experts, in both splits."""
    name, tp, seq = case
    rows = []
    for layout, ep in (("hf_sp sp=True", 1), ("hf_sp sp=True ep=tp", tp)):
        layer, model = moe_cost.count_layer(name, tp, ep)
        alive, formula = layer.alive_bytes, moe_cost.layer_bytes_per_token(name, tp, ep)
        kept = (alive, alive / seq, formula, round(alive / seq / formula, 4), None)
        wire = (spell(layer.forward), spell(layer.backward), layer.payload_bytes, layer.wire_bytes)
        rows.append(Row(name, tp, seq, layout, *kept, layer.peak_bytes, model.peak_bytes, *wire))
    return rows


def spell(counts: Mapping[str, CollectiveCount]) -> str:
    """Spell collectives out: `2 AG + 2 RS`."""
    short = {"all_gather": "AG", "reduce_scatter": "RS", "all_reduce": "AR", "all_to_all": "A2A"}
    return " + ".join(f"{c.calls} {short.get(k, k)}" for k, c in sorted(counts.items())) or "-"


HEADER = ("shape", "tp", "S", "layout", "alive MiB", "B/token", "formula", "/ formula", "/ native")
HEADER += ("peak MiB", "peak 3L", "forward", "backward", "payload MiB", "wire MiB")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, in the order of HEADER."""
    sizes = (row.alive_bytes, row.peak_bytes, row.peak_three_layers)
    alive, *peaks = (f"{size / MIB:.1f}" for size in sizes)
    wire = (f"{row.payload_bytes / MIB:.1f}", f"{row.wire_bytes / MIB:.1f}")
    tokens = (alive, f"{row.bytes_per_token:.0f}", f"{row.formula:.0f}")
    ratios = (f"{row.to_formula:.3f}", "-" if row.to_native is None else f"{row.to_native:.3f}")
    case = (row.shape, str(row.tp), str(row.seq), row.layout)
    return (*case, *tokens, *ratios, *peaks, row.forward, row.backward, *wire)


NOTES = """\
Per rank and per decoder layer, bfloat16, B = 1; AG all-gather, RS reduce-scatter, AR all-reduce,
A2A all-to-all (the rows' and their weights', and in forward one of E integers).
`alive` is what the forward leaves for the backward
(`B/token` the same per token of the whole sequence, `formula` its closed form,
`scripts/bench/_cost/layers.py`). `peak` is what one more layer adds to the most live bytes over
forward and backward, weight gradients included; `peak 3L` is that most itself for three layers,
with the transient buffers, a vocabulary of 256 and the loss. `payload` is the size of the full
buffers of the collectives; `wire` counts an all-reduce twice, for it moves what an all-gather and
a reduce-scatter move. DTensor TP+SP leaves its norm weights' gradients Partial: the all-reduces
they need are not in its row.
Parameters, allocator rounding and kernels' workspaces are not counted. The attention is the CPU
flash kernel, which keeps q, k, v, its output and an fp32 logsumexp.
"""


def write_results(rows: list[Row], folder: Path) -> None:
    """Write step_cost.csv and step_cost.md."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "step_cost.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        writer.writerows(astuple(row) for row in rows)
    lines = ["# The cost of a decoder layer in a training step", "", NOTES]
    lines.append(f"torch {torch.__version__}, transformers {transformers.__version__}.")
    lines.append("Made by `python scripts/bench/step_cost.py`.\n")
    lines.append("| " + " | ".join(HEADER) + " |")
    lines.append("|" + "---|" * len(HEADER))
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    (folder / "step_cost.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one small shape; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and markdown")
    options = parser.parse_args()
    console = Console() if Console().is_terminal else Console(width=200)
    rows = [row for case in (QUICK if options.quick else CASES) for row in measure(case)]
    rows += [row for case in SPARSE_CASES if not options.quick for row in measure_sparse(case)]
    table = Table(*HEADER, title="one decoder layer, one rank, one training step")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and (before.shape, before.tp) != (row.shape, row.tp):
            table.add_section()
        table.add_row(*cells(row))
    console.print(table)
    console.print(NOTES)
    if not options.quick:
        write_results(rows, options.out)
        console.print(f"written: {options.out}/step_cost.csv, {options.out}/step_cost.md")


if __name__ == "__main__":
    main()
