"""``hf_sp.verify``: the user's own model and batch, parallel against unsharded, on this machine.

What is compared: the loss, the logits of an evaluation, every parameter's gradient, copies on the
ranks, and the collectives that ran with those that the plan tells. Whole, or layer by layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_sp.api import parallelize
from hf_sp.comm.mesh import start_distributed
from hf_sp.errors import ConfigError
from hf_sp.estimate import StepAccounting
from hf_sp.proof import by_layer, runs
from hf_sp.proof.expected import check_room, differences, layout_of, tolerance_of
from hf_sp.proof.found import Verification, agreed
from hf_sp.proof.pieces import Given, Source, source_of
from hf_sp.proof.report import Report
from hf_sp.proof.runs import Batch, Ran, Truth
from hf_sp.state import parallel_state

DTYPES = (torch.float64, torch.float32)


def verify(
    model_or_factory: Given,
    batch: Batch,
    *,
    tp: int | None = None,
    sp: bool = True,
    dtype: torch.dtype = torch.float64,
    layers: bool | None = None,
    told: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> Verification:
    """Compare a parallel model with the unsharded one, on one batch. To be called on every rank.

    The model that is given stays as it is: a copy is compared. The first rank also runs the
    unsharded model, and needs memory for weights and gradients of the whole in ``dtype``; layer by
    layer for one decoder layer, and for the first one with embedding and head.

    Args:
        model_or_factory: a transformers causal LM, not parallelized yet; what makes one; a folder
            or a name in the local cache, read layer by layer if need be; a config, for random
            weights.
        batch: what its forward is given, with ``labels``; the same on every rank.
        tp: as in ``parallelize``, as is ``sp``.
        sp: shard the sequence.
        dtype: what both compute in. In float64 an error of 1e-10 is seen; float32 is half the
            memory.
        layers: compare layer by layer: each is given the unsharded layer's input and the gradient
            of its output. By default where the whole does not fit. ``Verification.unseen`` says
            what that does not show.
        told: is told what is being done, in words.
        **options: others of ``parallelize``: ``ep``, ``plan``, ``kernels``...

    Raises:
        ConfigError: no labels, a dtype, data parallel ranks, or too little memory.
        HfSpError: what ``parallelize`` refuses.
    """
    start_distributed()
    if dtype not in DTYPES or "labels" not in batch or {"dp_shard", "dp_replicate"} & {*options}:
        raise ConfigError(
            "verify compares a batch with labels, on tp ranks, in a dtype that shows faults",
            where="verify(...)",
            got=f"dtype={dtype}, {', '.join([*batch, *options])}",
            rule="lower dtypes hide faults in their rounding; groups have batches of their own",
            legal=f"dtype = {', '.join(map(str, DTYPES))}; batch with labels; no dp_shard",
        )
    source = source_of(model_or_factory, dtype)
    layers = check_room(source.numbers, dtype, layers)
    report = Report(
        type(source.model or source.shapes).__name__,
        dist.get_rank(),
        str(dtype).removeprefix("torch."),
    )
    compare = _by_layer if layers else _whole
    tolerance, why, ran, told_of = compare(source, batch, report, tp, sp, options, told)
    counts = Counter(kind for _, kind, _ in ran)
    words = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    return agreed(
        Verification(
            report.name,
            tp or dist.get_world_size() // options.get("cp", 1),
            sp,
            report.dtype,
            tolerance,
            why,
            sorted(report.rows, key=lambda row: -row.error),
            report.problems,
            words + told_of,
            source.changed,
            [*by_layer.UNSEEN] if layers else [],
        )
    )


_Found = tuple[float, str, Ran, str]


def _by_layer(
    source: Source,
    batch: Batch,
    report: Report,
    tp: int | None,
    sp: bool,
    options: dict[str, Any],
    told: Callable[[str], None],
) -> _Found:
    plan = by_layer.plan_of(source, tp or dist.get_world_size(), sp, options)
    largest = "a layer, or the first with the ends,"
    check_room(source.numbers_of(plan), source.dtype, False, largest)
    return *by_layer.compare_layers(source, plan, batch, report, options, told), ""


def _whole(
    source: Source,
    batch: Batch,
    report: Report,
    tp: int | None,
    sp: bool,
    options: dict[str, Any],
    told: Callable[[str], None],
) -> _Found:
    model = source.whole()
    inputs = runs.on(batch)
    told("the unsharded model")
    want = _truth(model, inputs) if dist.get_rank() == 0 else None
    told("the parallel model")
    parallel: Any = parallelize(model, tp, sp, **options)
    state = parallel_state(parallel)
    assert state is not None
    tolerance, why = tolerance_of(parallel, state, source.dtype)
    if state.offload:
        parallel.gradient_checkpointing_enable()
    # What adapters send depends on which linears have one, what cp ranks exchange on the mask, what
    # is given by token on the layer; checkpoints and tiles send it again.
    untold = {
        "context parallel ranks": state.parts is not None,
        "arguments of layers by token": bool(state.plan.per_token),
        "adapters": runs.has_adapters(model),
        "offloading": state.offload,
        "tiles": state.mlp_tile is not None,
    }
    without = [name for name, there in untold.items() if there]
    layout = None if without else layout_of(parallel, state, batch, source.dtype)
    with StepAccounting() as accounting:
        loss = parallel(**inputs).loss
        accounting.phase = "backward"
        loss.backward()
        ran = runs.collectives(accounting)
    runs.compare_ranks(report, loss)
    logits = runs.logits_of(parallel, inputs)
    results = {"loss": loss, "logits of an evaluation": logits}
    runs.compare_run(report, parallel, state, results, want)
    if layout is None:
        return tolerance, why, ran, f" (with {', '.join(without)} they are not compared)"
    report.problems += differences(ran, list(layout.collectives()))
    return tolerance, why, ran, ""


def _truth(model: nn.Module, inputs: dict[str, Any]) -> Truth:
    model.to(runs.device())
    with runs.as_judge(model):
        loss = model(**inputs).loss
        loss.backward()
        gradients = runs.take_gradients(model)
        logits = runs.logits_of(model, inputs)
    results = {"loss": loss.detach().cpu(), "logits of an evaluation": logits.cpu()}
    return Truth(results, gradients)
