"""Gradient parity of a parallelized model with the unsharded one; rank functions, for a pool.

    reports = pool(2).run(train, case=Case("llama", sp=True))
    assert_parity(reports)                      # tolerance from the case's dtype

A perfect forward proves nothing here (two of three deliberate faults leave the loss bit-equal), so
a report compares the loss of every micro-batch, EVERY parameter's gradient, the gradient norm, the
clipped gradients and the weights after two optimizer steps, and checks the contract (names,
placements, plain loss, equal replicas).

Tolerances and scales: harness/report.py. Comparisons: harness/compare.py.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness import batches, tiny
from harness.compare import (
    HarnessError,
    attempt,
    check_contract,
    check_replicas,
    compare_gradients,
    fresh,
    gather_objects,
    gradients,
    local,
    whole,
)
from harness.report import TOLERANCE, Report, assert_parity, size

__all__ = ["Case", "around", "assert_parity", "each", "pair", "train", "train_all"]


@dataclass(frozen=True)
class Case:
    """One cell of the parity matrix; tp is the world it runs on, divided by `data` and `cp`.

    `data` groups of ranks have batches of their own; the truth is the mean of their losses.

    `around` names a mutant of tests/mutants, which is in place for the life of the parallel model
    only, on every rank. `model_kwargs` are configuration overrides.
    """

    family: str
    sp: bool = True
    dtype: Literal["float64", "float32", "bfloat16"] = "float64"
    checkpoint: Literal["none", "non_reentrant", "reentrant"] = "none"
    accum: int = 1
    # SGD shows the size of a gradient (clipping missed, mean for sum); AdamW is what people use.
    optimizer: Literal["sgd", "adamw"] = "sgd"
    attn: str = "sdpa"
    steps: int = 2
    # Far below the norms here (0.5 to 5), so that clipping is active; checked.
    max_norm: float = 0.1
    seed: int = 0
    data: int = 1
    cp: int = 1
    around: str | None = None
    # The dtype that tolerances are of, where FSDP computes in a lower one than the weights have.
    judged: Literal["", "float32"] = ""
    # Saved, and read back shard by shard.
    loaded: bool = False
    parallelize: tuple[tuple[str, Any], ...] = ()
    model_kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        on = "sp" if self.sp else "tp-only"
        return (
            f"{self.family}-{on}-{self.checkpoint}-accum{self.accum}-{self.optimizer}-{self.dtype}"
            + (f"-data{self.data}" if self.data > 1 else "")
            + (f"-cp{self.cp}" if self.cp > 1 else "")
            + dict(self.parallelize).get("cp_mode", "")
        )

    def varied(self, **fields: Any) -> Case:
        """The same case but for some fields."""
        return replace(self, **fields)

    @property
    def tp(self) -> int:
        """Tensor parallel degree on this world."""
        return dist.get_world_size() // self.data // self.cp

    @property
    def group(self) -> int:
        """The group of this rank."""
        return dist.get_rank() // (self.tp * self.cp)


def train(case: Case) -> Report:
    """Two optimizer steps, parallel against unsharded."""
    report = Report(str(case), dist.get_rank(), case.judged or case.dtype)
    # The truth depends neither on sp nor on checkpointing nor on a mutant.
    plain = {"sp": True, "checkpoint": "none", "around": None, "parallelize": ()}
    plain |= {"loaded": False, "judged": "", "cp": 1}
    want = _reference_run(replace(case, **plain))
    with around(case):
        model, parallel = pair(case)
        check_contract(report, parallel, model)
        watch = _WatchLength(parallel)
        got = _run(parallel, case, report)
        watch.check(report, case)
    _compare_runs(report, got, want, case.group)
    check_replicas(report, parallel)
    return report


def train_all(cases: Iterable[Case]) -> list[Report]:
    """`train` for each case; what raised is in the report's problems."""
    return [attempt(str(case), lambda case=case: train(case)) for case in cases]


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """(unsharded, parallel): the same weights, in separate storage."""
    from hf_sp import from_pretrained, parallelize

    dtype = getattr(torch, case.dtype)
    model = tiny.build(case.family, dtype, case.seed, case.attn, **dict(case.model_kwargs))
    degrees = {} if case.data == 1 else {"dp_shard": case.data}
    kwargs = {"tp": case.tp, "cp": case.cp, "sp": case.sp, **degrees, **dict(case.parallelize)}
    if case.loaded:
        with tempfile.TemporaryDirectory() as folder:
            folder = gather_objects(folder)[0]
            if dist.get_rank() == 0:
                model.save_pretrained(folder)
            dist.barrier()
            how = {"attn_implementation": case.attn, "experts_implementation": "eager"}
            parallel = from_pretrained(folder, dtype=dtype, **how, **kwargs).train()
            dist.barrier()
    else:
        parallel = parallelize(copy.deepcopy(model), **kwargs)
    return tiny.reference(model), parallel


def each(case: Case, names: Iterable[str], run: Callable[[Report, str], None]) -> dict[str, Report]:
    """`run(report, name)` for each name; an error of one is in its report."""

    def one(name: str) -> Report:
        report = Report(f"{case} {name}", dist.get_rank(), case.dtype)
        run(report, name)
        return report

    return {name: attempt(f"{case} {name}", lambda name=name: one(name)) for name in names}


@dataclass
class _Step:
    # Of each micro-batch, by the group whose it is.
    losses: list[dict[int, Tensor]]
    gradients: dict[str, Tensor]
    norm: Tensor


@dataclass
class _Run:
    steps: list[_Step]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


# At most 2 MB each; ranks live for the session.
@functools.lru_cache(maxsize=64)
def _reference_run(case: Case) -> _Run:
    """The unsharded model's run."""
    dtype = getattr(torch, case.dtype)
    model = tiny.build(case.family, dtype, case.seed, case.attn, **dict(case.model_kwargs))
    return _run(tiny.reference(model), case, None)


def _run(model: nn.Module, case: Case, report: Report | None) -> _Run:
    if case.checkpoint != "none" and report is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpoint == "reentrant"})
    optimizer = _optimizer(model, case.optimizer)
    before = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    steps = []
    groups = range(case.data) if report is None else [case.group]
    for step in range(case.steps):
        losses: list[dict[int, Tensor]] = [{} for _ in range(case.accum)]
        for group in groups:
            seed = step * case.data + group
            made = batches.micro_batches(case.accum, model.config.vocab_size, seed=seed)
            for micro, batch in enumerate(made):
                loss = model(**fresh(batch)).loss
                (loss if report is not None else loss / case.data).backward()
                losses[micro][group] = loss.detach()
                if report is not None and type(loss) is not Tensor:
                    report.problems.append(f"loss is a {type(loss).__name__}, want a plain tensor")
        found = gradients(model, report)
        trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
        unclipped = {name: local(p.grad).clone() for name, p in trained.items()}
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), case.max_norm))
        steps.append(_Step(losses, found, norm))
        if report is not None:
            if not norm > 2 * case.max_norm:
                report.problems.append(
                    f"clipping is not active: norm {norm:g}, limit {case.max_norm:g}"
                )
            # Each rank's part is what it was times the one factor: clip_grad_norm_ may pass a
            # gradient over.
            for name, p in trained.items():
                scaled = unclipped[name] * (case.max_norm / (norm + 1e-6))
                report.compare(f"step {step + 1} clipped grad {name}", local(p.grad), scaled)
        optimizer.step()
        optimizer.zero_grad()
    return _Run(
        steps, before, {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    )


def _optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW.

    The rates move the weights by about a tenth in two steps, so that the second step's gradients
    are others. AdamW divides by sqrt(v) + eps: an element whose true gradient is zero has noise for
    a gradient (1e-17) and would get a full-size update of random sign under the usual eps of 1e-8
    for a noise of 1e-8. With eps = 1e-5, about the size of a clipped gradient's small elements,
    noise of 1e-17 moves a weight by 1e-12 of a step, and float32's noise of 1e-9 by 1e-4 of one:
    AdamW is compared in float64 only.
    """
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=2e-2, eps=1e-5, weight_decay=0.1)


def _compare_runs(report: Report, got: _Run, want: _Run, group: int) -> None:
    numbers, norms = [], []
    for index, (mine, theirs) in enumerate(zip(got.steps, want.steps, strict=True), 1):
        for micro, (one, other) in enumerate(zip(mine.losses, theirs.losses, strict=True), 1):
            report.compare(f"step {index} micro {micro} loss", one[group], other[group])
        compare_gradients(report, mine.gradients, theirs.gradients, f"step {index} ")
        report.compare(f"step {index} gradient norm", mine.norm, theirs.norm)
        numbers.append([float(x[group]).hex() for x in mine.losses])
        norms.append(float(mine.norm).hex())
    everyone = gather_objects((group, numbers, norms))
    same = [other for other in everyone if other[0] == group]
    if any(other[1] != numbers for other in same) or any(other[2] != norms for other in everyone):
        report.problems.append(f"losses or gradient norms differ between the ranks: {everyone}")
    eps = torch.finfo(getattr(torch, report.dtype)).eps
    for name, before in want.before.items():
        report.compare(f"initial {name}", got.before[name], before)
        # Changes, not weights: a weight is many times its change and would hide much of it. Each
        # step rounds each weight to half a unit in its last place, in either model; no change is
        # known better than that.
        rounding = len(want.steps) * eps * size(before) / TOLERANCE[report.dtype]
        report.compare(
            f"change of {name}",
            got.after[name] - got.before[name],
            want.after[name] - before,
            rounding,
        )


class _WatchLength:
    """Notes the sequence length that the second decoder layer sees: sharded if and only if sp."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: set[tuple[int, int]] = set()
        from hf_sp.state import parallel_state

        self.ring = parallel_state(model).plan.ring
        self.whole = 0
        model.get_input_embeddings().register_forward_hook(self._note_whole)
        model.base_model.layers[1].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note_whole(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.whole = output.shape[1]

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.seen.add((self.whole, hidden.shape[1]))

    def check(self, report: Report, case: Case) -> None:
        tp = case.tp if case.sp else 1
        # Of a place of a ring that is one rank alone, two stretches of one length.
        even = 2 if self.ring == case.cp > 1 and tp % 2 else 1
        want = {S: -(-S // (tp * case.cp * even)) * even for S, _ in self.seen}
        wrong = [(S, own) for S, own in self.seen if own != want[S]]
        if wrong or not self.seen:
            report.problems.append(
                f"sp={case.sp}: (whole, local) lengths between blocks were {sorted(self.seen)}"
            )


@contextlib.contextmanager
def around(case: Case):
    """The case's mutant in place, if it has one."""
    if case.around is None:
        yield
        return
    # Mutants are made of cases: they import this module.
    from mutants import applied

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(applied(case.around))
        except Exception as error:
            # A mutant that can't be put in place must not pass for one that was noticed.
            raise HarnessError(f"around={case.around!r} could not be entered") from error
        yield
