"""What a run of the whole model and a run of one layer have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_sp import gloo
from hf_sp.estimate import StepAccounting
from hf_sp.proof.reference import float64_loss
from hf_sp.proof.replicas import unequal_replicas
from hf_sp.proof.report import Report, floors
from hf_sp.state import ParallelState

Batch = Mapping[str, Any]
LABELS = ("labels", "shift_labels")
_OWN = "_c10d_functional."  # collectives of a step; what compares inputs goes another way
Ran = list[tuple[str, str, int]]
"""Collectives: phase, kind, bytes."""


@dataclass
class Truth:
    """Of the unsharded model: named results, and gradients; both on the CPU."""

    results: dict[str, Tensor]
    gradients: dict[str, Tensor]


def has_adapters(model: nn.Module) -> bool:
    """Whether it is PEFT's."""
    return hasattr(model, "get_base_model")


def core_of(model: Any) -> Any:
    """The model of transformers, inside of adapters or not."""
    return model.get_base_model() if has_adapters(model) else model


def device() -> str:
    """Where the ranks compute."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def on(batch: Batch) -> dict[str, Any]:
    """The batch there, for a forward that is not for a cache."""
    inputs = {k: v.to(device()) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {**inputs, "use_cache": False}


@contextlib.contextmanager
def as_judge(model: nn.Module) -> Iterator[None]:
    """Inside, the loss of a float64 model is computed in float64."""
    core = core_of(model)
    loss_function = getattr(core, "loss_function", None)
    wide = core.dtype == torch.float64 and loss_function is ForCausalLMLoss
    if wide:
        core.loss_function = float64_loss
    try:
        yield
    finally:
        if wide:
            # transformers' own again, which is looked up by name.
            core.loss_function = loss_function


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients there are, which the model loses."""
    found = ((n, p.grad) for n, p in model.named_parameters())
    gradients = {n: grad.cpu() for n, grad in found if grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Of an evaluation."""
    inputs = {name: value for name, value in batch.items() if name not in LABELS}
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        model.train()


def collectives(accounting: StepAccounting, first: int = 0, last: int | None = None) -> Ran:
    """Those of the step, of the records from ``first`` to ``last``."""
    gloo.finish()
    records = accounting.records[first:last]
    return [(r.phase, r.kind, r.bytes) for r in records if r.op.startswith(_OWN)]


def compare_run(
    report: Report,
    model: nn.Module,
    state: ParallelState,
    got: Mapping[str, Tensor],
    want: Truth | None,
) -> None:
    """Compare results and gradients with the truth, on the rank that has it; copies on all."""
    for what, x in got.items() if want is not None else ():
        assert want is not None
        report.compare(what, x.cpu(), want.results[what])
    _compare_gradients(model, report, want)
    copies = [*unequal_replicas(model, state), *unequal_replicas(model, state, gradients=True)]
    report.problems += [f"copies on the ranks differ: {name}" for name in copies]


def compare_ranks(report: Report, loss: Tensor) -> None:
    """The loss, bit for bit, over the ranks."""
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, float(loss.detach()).hex())
    if len({*losses}) > 1:
        report.problems.append(f"the loss differs between the ranks: {losses}")


def _compare_gradients(model: nn.Module, report: Report, want: Truth | None) -> None:
    least = floors(want.gradients) if want is not None else {}
    for name, p in model.named_parameters():
        gradient = p.grad
        if isinstance(gradient, DTensor) and gradient.placements != p.placements:  # type: ignore[attr-defined]
            report.problems.append(f"gradient of {name} is placed as {gradient.placements}")
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        if want is None:
            continue
        if (whole is None) != (name not in want.gradients):
            report.problems.append(f"gradient of {name}: {'none' if whole is None else 'one'}")
        elif whole is not None:
            report.compare(f"gradient of {name}", whole.cpu(), want.gradients[name], least[name])
