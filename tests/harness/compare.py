"""Comparisons of a parallel model with the unsharded one, on a rank.

Owns: what is compared and what the contract asks of parameters, gradients and losses. Must not
know: how the models were made, training loops.
"""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.batches import Batch
from harness.report import Report, floors


class HarnessError(Exception):
    """The test is broken, not what it tests; never part of a report."""


def compare_loss(report: Report, got: Tensor, want: Tensor, label: str = "") -> None:
    """The loss: its value, its type, equal bits on all ranks."""
    if type(got) is not Tensor:
        report.problems.append(f"{label}loss is a {type(got).__name__}, want a plain tensor")
    report.compare(f"{label}loss", got, want)
    everyone = gather_objects(got.detach().double().item().hex())
    if len(set(everyone)) != 1:
        report.problems.append(f"{label}loss differs between the ranks: {everyone}")


def compare_gradients(
    report: Report, got: dict[str, Tensor], want: dict[str, Tensor], label: str = ""
) -> None:
    """Every parameter's gradient."""
    if got.keys() != want.keys():
        report.problems.append(
            f"{label}gradients of other parameters: {sorted(got.keys() ^ want.keys())}"
        )
    least = floors(want)
    for name in (name for name in want if name in got):
        report.compare(f"{label}grad {name}", got[name], want[name], least[name])


def gradients(model: nn.Module, report: Report | None = None) -> dict[str, Tensor]:
    """Whole gradients by name.

    With a report, their placements are checked before anything is gathered.
    """
    out = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None:
            continue
        if report is not None:
            if not isinstance(gradient, DTensor):
                report.problems.append(
                    f"grad {name} is a {type(gradient).__name__}, want a DTensor"
                )
            elif gradient.placements != parameter.placements:
                report.problems.append(
                    f"grad {name} is {gradient.placements}, its parameter {parameter.placements}"
                )
        out[name] = whole(gradient).detach().clone()
    return out


def check_contract(report: Report, parallel: nn.Module, model: nn.Module) -> None:
    """Names, types, shapes, requires_grad, mesh axis of the parallel model against HF's."""
    mine, theirs = dict(parallel.named_parameters()), dict(model.named_parameters())
    problems = report.problems
    if list(mine) != list(theirs):
        problems.append(f"parameter names differ: {sorted(mine.keys() ^ theirs.keys())}")
    if list(parallel.state_dict()) != list(model.state_dict()):
        problems.append("state_dict names differ")
    if not isinstance(parallel, type(model)):
        problems.append(f"{type(parallel).__name__} is no {type(model).__name__}")
    if parallel.training != model.training:
        problems.append(f"training={parallel.training}, want {model.training}")
    sharded = 0
    for name, parameter in mine.items():
        if not isinstance(parameter, DTensor):
            problems.append(f"{name} is a {type(parameter).__name__}, want a DTensor")
            continue
        if "tp" not in (parameter.device_mesh.mesh_dim_names or ()):
            problems.append(
                f"{name}: mesh axes {parameter.device_mesh.mesh_dim_names}, want one named tp"
            )
        if any(p.is_partial() for p in parameter.placements):
            problems.append(f"{name} is {parameter.placements}")
        if (
            parameter.shape != theirs[name].shape
            or parameter.requires_grad != theirs[name].requires_grad
        ):
            problems.append(
                f"{name}: {tuple(parameter.shape)}, requires_grad={parameter.requires_grad}"
            )
        sharded += not all(p.is_replicate() for p in parameter.placements)
    # q, o and three in the mlp for each of two layers, embedding: at least these must be split; or
    # where gate and up are one, and q, k and v, o and two in the mlp.
    if sharded < (7 if any("qkv_proj" in name for name in mine) else 11):
        problems.append(f"only {sharded} parameters are sharded")


def check_replicas(report: Report, parallel: nn.Module) -> None:
    """Replicated parameters and buffers hold the same bits on every rank."""
    digests = {}
    for name, tensor in [*parallel.named_parameters(), *parallel.named_buffers()]:
        if isinstance(tensor, DTensor) and not all(p.is_replicate() for p in tensor.placements):
            continue
        digests[name] = _digest(tensor)
    first, *others = gather_objects(digests)
    if first.keys() != digests.keys():
        report.problems.append("the ranks replicate different parameters")
    unequal = sorted(
        name for name in first if any(other.get(name) != first[name] for other in others)
    )
    if unequal:
        report.problems.append(f"replicas differ between the ranks: {unequal}")


def compare_plain(report: Report, what: str, got: Tensor | None, want: Tensor) -> None:
    if type(got) is not Tensor:
        report.problems.append(f"{what}: {type(got).__name__}, want a plain tensor")
        return
    report.compare(what, got, want)


def compare_once(
    report: Report,
    model: nn.Module,
    parallel: nn.Module,
    batch: Batch,
    *,
    backward: Callable[[Any], None] = lambda output: output.loss.backward(),
    label: str = "",
) -> tuple[Any, Any]:
    """One forward and backward of both models: loss, gradients, that of inputs_embeds too.

    Returns both outputs, for more comparisons. `label` names the rows.
    """
    outputs = []
    embeds = []
    for one in (model, parallel):
        one.zero_grad(set_to_none=True)
        inputs = fresh(batch)
        output = one(**inputs)
        backward(output)
        outputs.append(output)
        embeds.append(inputs.get("inputs_embeds"))
    want, got = outputs
    compare_loss(report, got.loss, want.loss, label)
    compare_gradients(report, gradients(parallel, report), gradients(model), label)
    if embeds[0] is not None:
        report.compare(f"{label}grad inputs_embeds", embeds[1].grad, embeds[0].grad)
    return want, got


def attempt(name: str, run: Callable[[], Report]) -> Report:
    """`run()`, or a report of the error that *every* rank raised.

    One refusal must not hide the rest. An error on some ranks only leaves them out of step, and
    fails the whole job.
    """
    try:
        report, error = run(), None
    except HarnessError:
        raise
    except Exception:  # reported as this one's failure
        report, error = Report(name, dist.get_rank()), traceback.format_exc()
        report.problems.append(error)
    failed = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(failed, torch.tensor([float(error is not None)]))
    if 0 < sum(int(flag) for flag in failed) < len(failed):
        raise AssertionError(f"{name}: the ranks disagree; this one: {error or 'fine'}")
    return report


def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor; other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fresh(batch: Batch) -> Batch:
    """A copy that shares nothing: leaves that want a gradient stay such leaves."""
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model in models:
            model.train()


def gather_objects(value: Any) -> list:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def _digest(tensor: Tensor) -> str:
    raw = local(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()
