"""What ``verify`` expects before it looks: collectives, tolerance, room in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

from hf_sp.errors import ConfigError
from hf_sp.model.norm import NormForward
from hf_sp.plan.known_forms import norm_form
from hf_sp.plan.layouts import Collective, StepLayout, Tokens
from hf_sp.plan.step import step_layout
from hf_sp.proof.report import IN_FLOAT32, IN_SCANS, TOLERANCE
from hf_sp.state import ParallelState, parallel_model


def differences(ran: Iterable[tuple[str, str, int]], told: list[Collective]) -> Iterator[str]:
    """Collectives that the plan does not tell, or that did not run, in words.

    What a router sends is counted, not measured.
    """
    varying = {(c.phase, c.kind) for c in told if c.varies}
    fixed = {(c.phase, c.kind, c.bytes) for c in told if not c.varies}
    want: Counter[tuple[str, str, int]] = Counter()
    want.update((c.phase, c.kind, -1 if c.varies else c.bytes) for c in told)
    got: Counter[tuple[str, str, int]] = Counter()
    got.update(r if r in fixed or r[:2] not in varying else (*r[:2], -1) for r in ran)
    for key in sorted({*want, *got}):
        if want[key] != got[key]:
            phase, kind, size = key
            what = "rows" if size < 0 else f"{size:,} bytes"
            yield f"{phase}: {got[key]} {kind} of {what} ran, the plan tells {want[key]}"


def layout_of(
    model: Any, state: ParallelState, batch: Mapping[str, Any], dtype: torch.dtype
) -> StepLayout:
    """The layouts of the step that the batch is given to."""
    tokens = next(batch[name] for name in ("input_ids", "inputs_embeds") if name in batch)
    config = model.config.get_text_config()
    asked = batch.get("output_router_logits", getattr(config, "output_router_logits", False))
    batch_size, length = tokens.shape[:2]
    sizes = Tokens(
        batch_size,
        length,
        itemsize=dtype.itemsize,
        loss_chunk=state.loss_chunk,
        router_logits=bool(asked),
        fused=state.fused,
    )
    return step_layout(model, state.plan, sizes)


def tolerance_of(model: nn.Module, state: ParallelState, dtype: torch.dtype) -> tuple[float, str]:
    """The largest error that rounding explains, and why."""
    name = str(dtype).removeprefix("torch.")
    plan = state.plan
    if dtype != torch.float64:
        return TOLERANCE[name], "float32 sums in another order"
    modules = dict(cast(nn.Module, parallel_model(model)).named_modules())
    partial = [path for block in plan.blocks for path in block.partial]
    norms = [modules[path] for path in (*plan.shard_norms, plan.norm, *partial)]
    inside = {
        "routers": any(block.experts for block in plan.blocks),
        "norms over all heads": any(block.over_heads for block in plan.blocks),
        "weights of norms": any(map(_in_float32, norms)),
        "scans of linear attentions": any(block.mixer for block in plan.blocks),
    }
    if found := [what for what, met in inside.items() if met]:
        tolerance = IN_SCANS if inside["scans of linear attentions"] else IN_FLOAT32
        return tolerance, f"{' and '.join(found)} compute in float32 in transformers"
    return TOLERANCE[name], "float64 sums in another order"


def _in_float32(norm: nn.Module) -> bool:
    """Whether a norm of transformers may cast its weight down; its forward may be ours by now."""
    forward = norm.__dict__.get("forward")
    form = forward.form if isinstance(forward, NormForward) else norm_form(norm)
    if form is None:
        return not type(norm).__module__.startswith("torch.")
    return bool(form.offset) or not form.float64


def check_room(
    numbers: int, dtype: torch.dtype, layers: bool | None, what: str = "the model"
) -> bool:
    """Whether to compare layer by layer, the same on all ranks; ``layers`` if it is said.

    A copy on each rank, and gradients and shards of one: on a host together, on GPUs on the first.

    Raises:
        ConfigError: there is no room for so many weights, and it was said that there is.
    """
    host, ranks = dist.get_backend() == "gloo", dist.get_world_size()
    copies = ranks + 2 if host else 3
    need, free = numbers * dtype.itemsize * copies, available_memory() if host else gpu_memory()
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, free is not None and need > free)
    if layers is None or layers or not any(everyone):
        return any(everyone) if layers is None else layers
    raise ConfigError(
        f"{what} does not fit this machine unsharded",
        where="verify(...)",
        got=f"{need / 2**30:.1f} GiB for {copies} copies in {dtype}"
        + ("" if free is None else f"; {free / 2**30:.1f} GiB are available"),
        rule="each rank starts from whole weights, and the first one has their gradients too",
        legal="layers=True (hf-sp verify --by-layer), which needs room for one layer and the ends",
        remedy="float32 is half of it; or fewer layers (--layers 2): those of one kind are alike",
    )


def gpu_memory() -> int:
    """Bytes that are free on this rank's GPU."""
    return torch.cuda.mem_get_info()[0]


def available_memory() -> int | None:
    """Bytes that this machine can give to new processes; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
