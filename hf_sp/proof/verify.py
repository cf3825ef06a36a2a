"""``hf_sp.verify``: the user's own model and batch, parallel against unsharded, on this machine.

What is compared: the loss, the logits of an evaluation, every parameter's gradient, copies on the
ranks, and the collectives that ran with those that the plan tells.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_sp import gloo
from hf_sp.api import parallelize
from hf_sp.comm.mesh import start_distributed
from hf_sp.errors import ConfigError
from hf_sp.estimate import StepAccounting
from hf_sp.plan.layouts import StepLayout
from hf_sp.proof.expected import check_memory, differences, layout_of, tolerance_of
from hf_sp.proof.reference import float64_loss, without_dropout
from hf_sp.proof.replicas import unequal_replicas
from hf_sp.proof.report import Report, Row, floors
from hf_sp.state import ParallelState, parallel_state

Batch = Mapping[str, Any]
DTYPES = (torch.float64, torch.float32)
_OWN = "_c10d_functional."  # collectives of a step; what compares inputs goes another way


@dataclass
class Verification:
    """What ``verify`` found, the same on every rank; true if everything agrees.

    Attributes:
        rows: comparisons, the largest error first; an error is relative to the largest element.
        problems: what is no matter of rounding, in words.
        tolerance: the largest error that rounding explains; ``why`` says how it was derived.
        collectives: how many ran, in words.
        changed: dropouts that were set to zero for the comparison.
    """

    name: str
    tp: int
    sp: bool
    dtype: str
    tolerance: float
    why: str
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    collectives: str = ""
    changed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.rows) and not self.problems and not self.wrong

    @property
    def wrong(self) -> list[Row]:
        """Comparisons that rounding does not explain, the worst first."""
        return [row for row in self.rows if not row.error <= self.tolerance]

    def as_data(self) -> dict[str, Any]:
        """For programs."""
        return {"agrees": bool(self), **asdict(self)}

    def __str__(self) -> str:
        worst = self.rows[0].error if self.rows else float("inf")
        lines = [
            f"{self.name}, tp={self.tp}, sp={self.sp}, {self.dtype}: "
            f"{'agrees' if self else 'DOES NOT AGREE'} with the unsharded model",
            f"  {len(self.rows)} comparisons, worst {worst:.1e}; rounding explains "
            f"{self.tolerance:.0e}: {self.why}",
            f"  collectives: {self.collectives}",
        ]
        lines += [f"  {row.error:.1e} {row.what}" for row in (self.wrong or self.rows)[:8]]
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems)])


def verify(
    model_or_factory: nn.Module | Callable[[], nn.Module],
    batch: Batch,
    *,
    tp: int | None = None,
    sp: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Verification:
    """Compare a parallel model with the unsharded one, on one batch. To be called on every rank.

    The model that is given stays as it is: a copy is compared. The first rank also runs the
    unsharded model, and needs memory for weights and gradients of the whole in ``dtype``. Nothing
    is compared layer by layer: a model that does not fit is refused, before anything is made.

    Args:
        model_or_factory: a transformers causal LM, not parallelized yet, or what makes one.
        batch: what its forward is given, with ``labels``; the same on every rank.
        tp: as in ``parallelize``, as is ``sp``.
        sp: shard the sequence.
        dtype: what both compute in. In float64 an error of 1e-10 is seen; float32 is half the
            memory.
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
    given = model_or_factory
    model: Any = copy.deepcopy(given) if isinstance(given, nn.Module) else given()
    check_memory(model, dtype)
    model = model.to(dtype)
    changed = without_dropout(model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the definition; HF's grouped has no float64
    model.train()
    first = dist.get_rank() == 0
    want = _reference(model, batch) if first else None
    parallel = parallelize(model, tp, sp, **options)
    state = parallel_state(parallel)
    assert state is not None
    tolerance, why = tolerance_of(parallel, state, dtype)
    report = Report(type(model).__name__, state.everyone.rank, str(dtype).removeprefix("torch."))
    if state.offload:
        parallel.gradient_checkpointing_enable()
    # What adapters send depends on which linears have one; checkpoints and tiles send it again.
    untold = _has_adapters(model) or state.offload or state.mlp_tile is not None
    layout = None if untold else layout_of(parallel, state, batch, dtype)
    ran = _parallel(parallel, state, batch, report, want, layout)
    found = Verification(
        report.name,
        state.tp,
        state.sp,
        report.dtype,
        tolerance,
        why,
        sorted(report.rows, key=lambda row: -row.error),
        report.problems,
        ran,
        changed,
    )
    return _agree(found)


# --- the two runs ---------------------------------------------------------------------------------


@dataclass
class _Truth:
    loss: Tensor
    logits: Tensor
    gradients: dict[str, Tensor]


def _reference(model: Any, batch: Batch) -> _Truth:
    core: Any = model.get_base_model() if _has_adapters(model) else model
    loss_function = getattr(core, "loss_function", None)
    wide = core.dtype == torch.float64 and loss_function is ForCausalLMLoss
    if wide:
        core.loss_function = float64_loss
    device = _device()
    model.to(device)
    try:
        output = model(**_on(batch, device))
        output.loss.backward()
        found = ((n, p.grad) for n, p in model.named_parameters())
        gradients = {n: grad.cpu() for n, grad in found if grad is not None}
        model.zero_grad(set_to_none=True)
        logits = _logits(model, _on(batch, device))
        return _Truth(output.loss.detach().cpu(), logits.cpu(), gradients)
    finally:
        if wide:
            # transformers' own again, which is looked up by name.
            core.loss_function = loss_function


def _has_adapters(model: nn.Module) -> bool:
    return hasattr(model, "get_base_model")


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {
        name: value for name, value in batch.items() if name not in ("labels", "shift_labels")
    }
    model.eval()
    try:
        with torch.no_grad():
            return model(**inputs).logits
    finally:
        model.train()


def _parallel(
    model: Any,
    state: ParallelState,
    batch: Batch,
    report: Report,
    want: _Truth | None,
    layout: StepLayout | None,
) -> str:
    """Run the parallel model, compare on the first rank; the collectives in words."""
    inputs = _on(batch, torch.device(_device()))
    with StepAccounting() as accounting:
        loss = model(**inputs).loss
        accounting.phase = "backward"
        loss.backward()
        gloo.finish()
    if want is not None:
        report.compare("loss", loss.cpu(), want.loss)
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, float(loss.detach()).hex())
    if len({*losses}) > 1:
        report.problems.append(f"the loss differs between the ranks: {losses}")
    _compare_gradients(model, report, want)
    copies = [*unequal_replicas(model, state), *unequal_replicas(model, state, gradients=True)]
    report.problems += [f"copies on the ranks differ: {name}" for name in copies]
    logits = _logits(model, inputs)
    if want is not None:
        report.compare("logits of an evaluation", logits.cpu(), want.logits)
    ran = [(r.phase, r.kind, r.bytes) for r in accounting.records if r.op.startswith(_OWN)]
    counts = Counter(kind for _, kind, _ in ran)
    words = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
    if layout is None:
        return f"{words} (with adapters they are not compared)"
    report.problems += differences(ran, list(layout.collectives()))
    return words


def _compare_gradients(model: nn.Module, report: Report, want: _Truth | None) -> None:
    parameters = dict(model.named_parameters())
    least = floors(want.gradients) if want is not None else {}
    for name, p in parameters.items():
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


# --- ranks ----------------------------------------------------------------------------------------


def _agree(found: Verification) -> Verification:
    """The first rank's comparisons and every rank's problems, on all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    first = everyone[0]
    for rank, other in enumerate(everyone[1:], 1):
        mine = (f"rank {rank}: {problem}" for problem in other.problems)
        first.problems += [p for p in mine if p.split(": ", 1)[1] not in first.problems]
    return first


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _on(batch: Batch, device: torch.device | str) -> dict[str, Any]:
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return {**inputs, "use_cache": False}
