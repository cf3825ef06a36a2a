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
from hf_sp.plan.known_forms import norm_form
from hf_sp.plan.layouts import Collective, StepLayout, Tokens
from hf_sp.plan.step import step_layout
from hf_sp.proof.report import IN_FLOAT32, TOLERANCE
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
    forms = [norm_form(modules[path]) for path in (*plan.shard_norms, plan.norm)]
    inside = []
    if any(block.experts for block in plan.blocks):
        inside.append("routers")
    if any(block.over_heads for block in plan.blocks):
        inside.append("norms over all heads")
    if any(form is not None and form.offset for form in forms):
        inside.append("weights of norms")
    if inside:
        return IN_FLOAT32, f"{' and '.join(inside)} compute in float32 in transformers"
    return TOLERANCE[name], "float64 sums in another order"


def check_memory(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse what the host has no room for: a copy on each rank, and gradients on the first."""
    ranks, free, host = dist.get_world_size(), available_memory(), dist.get_backend() == "gloo"
    need = sum(p.numel() for p in model.parameters()) * dtype.itemsize * (ranks + 2)
    if host and free is not None and need > free:
        raise ConfigError(
            "the model does not fit this machine unsharded",
            where="verify(...)",
            got=f"{need / 2**30:.1f} GiB for {ranks} copies in {dtype} and gradients; "
            f"{free / 2**30:.1f} GiB are available",
            rule="every rank starts from the whole model, and the first one has its gradients too",
            remedy="verify it with fewer layers (hf-sp verify NAME --layers 2), or in float32: "
            "layers of one kind are parallelized alike",
        )


def available_memory() -> int | None:
    """Bytes that this machine can give to new processes; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = dict(line.split(":", 1) for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
