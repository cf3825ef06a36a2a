"""Gradient parity of a parallelized model with the unsharded one; rank functions, for a pool.

    reports = pool(2).run("harness.parity:train", case=Case("llama", sp=True))
    assert_parity(reports)                      # tolerance from the case's dtype

A perfect forward proves nothing here (two of three deliberate faults leave the loss bit-equal), so
a report compares the loss of every micro-batch, EVERY parameter's gradient, the gradient norm, the
clipped gradients and the weights after two optimizer steps, and checks the contract (names,
placements, plain loss, equal replicas).

Tolerances
----------
float64, 1e-10. Parallel and unsharded model differ in the order of sums only. A sum of n numbers
carries an error of about eps * sqrt(n): 2e-16 * sqrt(100) = 2e-15 here, times a few for a dozen
operations in a row: 1e-14. What lies between 1e-14 and 1e-10 is room for other machines' kernels;
every fault worth the name is above 1e-4.

HF's RMSNorm computes in float32 whatever the dtype, and
so rounds its input and its gradient to 24 bits. Where the two models agree bit for bit before that,
nothing happens; where they differ by 1e-16 relative, the rounding swallows the difference, unless
the value lies that close to a rounding boundary: probability 1e-16 / 6e-8, about 2e-9 per element
and a few times that for differences of a few eps. Then that one element differs by 6e-8, and the
gradients by about 1e-9. The matrix rounds about 5e7 elements, of which most are bit-equal; the run
is deterministic on a machine, so this can't come and go there: an error of 1e-9 in one cell of a
new machine would be this, not a fault of hf_sp, and another seed for that cell the remedy.

float32, 1e-5. 1.2e-7 * sqrt(100) * a few = 4e-6.

Relative to what
----------------
To the largest element of the reference tensor. Single elements have no scale of their own: they are
sums that cancel. Some gradients cancel as a whole: with one token the softmax is constant, and q's
and k's true gradients are zero. Their rounding error comes from terms of the size of the *other*
gradients of the block, so the scale is never taken below FLOOR = 1e-3 of the largest gradient in
the same module (self_attn, mlp, ...). That hides nothing: a fault in a gradient that is 1e-6 of its
block's is still judged to 1e-10 * 1e-3 / 1e-6 = 1e-7 of itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness import batches, tiny

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
FLOOR = 1e-3


@dataclass(frozen=True)
class Case:
    """One cell of the parity matrix; tp is the world it runs on.

    `around` names a context manager factory ("module:function", no arguments) entered for the life
    of the parallel model only, on every rank: the place for a mutant. `model_kwargs` are
    configuration overrides.
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
    around: str | None = None
    parallelize: tuple[tuple[str, Any], ...] = ()
    model_kwargs: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        on = "sp" if self.sp else "tp-only"
        return (
            f"{self.family}-{on}-{self.checkpoint}-accum{self.accum}-{self.optimizer}-{self.dtype}"
        )


@dataclass(frozen=True)
class Row:
    """One comparison: `error` is max|got - want| over `scale`."""

    what: str
    error: float
    scale: float


@dataclass
class Report:
    """What one rank found. `problems` are breaches of the contract, in words."""

    name: str
    rank: int = 0
    dtype: str = "float64"
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest error; infinite if nothing was compared."""
        return max((row.error for row in self.rows), default=float("inf"))

    def table(self, rows: int = 5) -> str:
        """The largest errors, one a line."""
        ordered = sorted(self.rows, key=lambda row: -row.error)[:rows]
        lines = [f"{row.error:10.2e}  of {row.scale:8.2e}  {row.what}" for row in ordered]
        return "\n".join([f"{self.name} (rank {self.rank}, {len(self.rows)} comparisons)", *lines])

    def compare(self, what: str, got: Tensor, want: Tensor, floor: float = 0.0) -> None:
        """Add a row.

        NaN anywhere but in both is an infinite error. Shapes and dtypes must agree.
        """
        got, want = got.detach(), want.detach()
        if got.shape != want.shape or got.dtype != want.dtype:
            self.problems.append(
                f"{what}: {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
            )
            return
        got, want = got.double(), want.double()
        if not torch.equal(got.isfinite(), want.isfinite()):
            self.rows.append(Row(what, float("inf"), 0.0))
            return
        got, want = (x.nan_to_num(0.0, 0.0, 0.0) for x in (got, want))
        scale = max(_size(want), floor)
        difference = _size(got - want)
        self.rows.append(
            Row(what, difference / scale if scale else (float("inf") if difference else 0.0), scale)
        )


def assert_parity(reports: Report | Sequence[Report], tol: float | None = None) -> None:
    """Fail with the worst five errors of each rank if any is above `tol` (default.

    By dtype), or any contract broken.
    """
    reports = [reports] if isinstance(reports, Report) else list(reports)
    lines = []
    for report in reports:
        limit = TOLERANCE[report.dtype] if tol is None else tol
        if not report.rows:
            lines.append(f"{report.name} (rank {report.rank}): nothing was compared")
        if report.problems:
            lines += [
                f"{report.name} (rank {report.rank}): {problem}" for problem in report.problems
            ]
        if not report.worst <= limit:
            lines.append(f"above {limit:g}: {report.table()}")
    if lines:
        raise AssertionError("\n".join(lines))


# -------------------------------------------------------------------------------------------------
# Rank functions
# -------------------------------------------------------------------------------------------------


def train(case: Case) -> Report:
    """Two optimizer steps, parallel against unsharded."""
    report = Report(str(case), dist.get_rank(), case.dtype)
    # The truth depends neither on sp nor on checkpointing nor on a mutant.
    want = _reference_run(replace(case, sp=True, checkpoint="none", around=None, parallelize=()))
    with _around(case):
        model, parallel = pair(case)
        check_contract(report, parallel, model)
        watch = _WatchLength(parallel)
        got = _run(parallel, case, report)
        watch.check(report, case.sp)
    _compare_runs(report, got, want)
    check_replicas(report, parallel)
    return report


def train_all(cases: Iterable[Case]) -> list[Report]:
    """`train` for each case; what raised is in the report's problems."""
    return [attempt(str(case), lambda case=case: train(case)) for case in cases]


def attempt(name: str, run: Callable[[], Report]) -> Report:
    """`run()`, or a report of the error that *every* rank raised: one refusal must not hide the rest.

    An error on some ranks only leaves them out of step, and fails the whole job.
    """
    try:
        report, error = run(), None
    except Exception:  # reported as this one's failure
        report, error = Report(name, dist.get_rank()), traceback.format_exc()
        report.problems.append(error)
    failed = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(failed, torch.tensor([float(error is not None)]))
    if 0 < sum(int(flag) for flag in failed) < len(failed):
        raise AssertionError(f"{name}: the ranks disagree; this one: {error or 'fine'}")
    return report


def pair(case: Case) -> tuple[nn.Module, nn.Module]:
    """(unsharded, parallel): the same weights, in separate storage."""
    from hf_sp import parallelize

    dtype = getattr(torch, case.dtype)
    model = tiny.build(case.family, dtype, case.seed, case.attn, **dict(case.model_kwargs))
    parallel = copy.deepcopy(model)
    parallel = parallelize(parallel, tp=dist.get_world_size(), sp=case.sp, **dict(case.parallelize))
    return tiny.reference(model), parallel


def compare_once(
    report: Report,
    model: nn.Module,
    parallel: nn.Module,
    batch: batches.Batch,
    *,
    backward: Callable[[Any], None] = lambda output: output.loss.backward(),
    label: str = "",
) -> tuple[Any, Any]:
    """One forward and backward of both models on a batch: loss, gradients, the gradient of
    inputs_embeds.

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


def compare_loss(report: Report, got: Tensor, want: Tensor, label: str = "") -> None:
    """The loss: its value, its type, equal bits on all ranks."""
    if type(got) is not Tensor:
        report.problems.append(f"{label}loss is a {type(got).__name__}, want a plain tensor")
    report.compare(f"{label}loss", got, want)
    everyone = _gather_objects(got.detach().double().item().hex())
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
    floors: dict[str, float] = {}
    for name, gradient in want.items():
        owner = _owner(name)
        floors[owner] = max(floors.get(owner, 0.0), FLOOR * _size(gradient))
    for name in want.keys() & got.keys():
        report.compare(f"{label}grad {name}", got[name], want[name], floors[_owner(name)])


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
        sharded += any(p.is_shard() for p in parameter.placements)
    # q, o and three in the mlp for each of two layers, embedding: at least these must be split.
    if sharded < 11:
        problems.append(f"only {sharded} parameters are sharded")


def check_replicas(report: Report, parallel: nn.Module) -> None:
    """Replicated parameters and buffers hold the same bits on every rank."""
    digests = {}
    for name, tensor in [*parallel.named_parameters(), *parallel.named_buffers()]:
        if isinstance(tensor, DTensor) and not all(p.is_replicate() for p in tensor.placements):
            continue
        digests[name] = _digest(tensor)
    first, *others = _gather_objects(digests)
    if first.keys() != digests.keys():
        report.problems.append("the ranks replicate different parameters")
    unequal = sorted(
        name for name in first if any(other.get(name) != first[name] for other in others)
    )
    if unequal:
        report.problems.append(f"replicas differ between the ranks: {unequal}")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor; other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fresh(batch: batches.Batch) -> batches.Batch:
    """A copy that shares nothing: leaves that want a gradient stay such leaves."""
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in batch.items()
    }


# -------------------------------------------------------------------------------------------------
# The training loop, the same for both models
# -------------------------------------------------------------------------------------------------


@dataclass
class _Step:
    losses: list[Tensor]
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
    for step in range(case.steps):
        losses = []
        for batch in batches.micro_batches(case.accum, model.config.vocab_size, seed=step):
            loss = model(**fresh(batch)).loss
            loss.backward()
            losses.append(loss.detach())
            if report is not None and type(loss) is not Tensor:
                report.problems.append(f"loss is a {type(loss).__name__}, want a plain tensor")
        found = gradients(model, report)
        unclipped = {name: _local(p.grad).clone() for name, p in model.named_parameters()}
        norm = whole(nn.utils.clip_grad_norm_(model.parameters(), case.max_norm))
        steps.append(_Step(losses, found, norm))
        if report is not None:
            if not norm > 2 * case.max_norm:
                report.problems.append(
                    f"clipping is not active: norm {norm:g}, limit {case.max_norm:g}"
                )
            # Each rank's part is what it was times the one factor: clip_grad_norm_ may pass a
            # gradient over.
            for name, p in model.named_parameters():
                scaled = unclipped[name] * (case.max_norm / (norm + 1e-6))
                report.compare(f"step {step + 1} clipped grad {name}", _local(p.grad), scaled)
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


def _compare_runs(report: Report, got: _Run, want: _Run) -> None:
    numbers = []
    for index, (mine, theirs) in enumerate(zip(got.steps, want.steps, strict=True), 1):
        for micro, (one, other) in enumerate(zip(mine.losses, theirs.losses, strict=True), 1):
            report.compare(f"step {index} micro {micro} loss", one, other)
        compare_gradients(report, mine.gradients, theirs.gradients, f"step {index} ")
        report.compare(f"step {index} gradient norm", mine.norm, theirs.norm)
        numbers.append([float(x).hex() for x in (*mine.losses, mine.norm)])
    everyone = _gather_objects(numbers)
    if any(other != everyone[0] for other in everyone):
        report.problems.append(f"losses or gradient norms differ between the ranks: {everyone}")
    eps = torch.finfo(getattr(torch, report.dtype)).eps
    for name, before in want.before.items():
        report.compare(f"initial {name}", got.before[name], before)
        # Changes, not weights: a weight is many times its change and would hide much of it. Each
        # step rounds each weight to half a unit in its last place, in either model; no change is
        # known better than that.
        rounding = len(want.steps) * eps * _size(before) / TOLERANCE[report.dtype]
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
        self.whole = 0
        model.model.embed_tokens.register_forward_hook(self._note_whole)
        model.model.layers[1].register_forward_pre_hook(self._note, with_kwargs=True)

    def _note_whole(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.whole = output.shape[1]

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.seen.add((self.whole, hidden.shape[1]))

    def check(self, report: Report, sp: bool) -> None:
        tp = dist.get_world_size() if sp else 1
        wrong = [pair for pair in self.seen if pair[1] != -(-pair[0] // tp)]
        if wrong or not self.seen:
            report.problems.append(
                f"sp={sp}: (whole, local) sequence lengths between blocks were {sorted(self.seen)}"
            )


@contextlib.contextmanager
def _around(case: Case):
    if case.around is None:
        yield
        return
    module, name = case.around.split(":")
    with getattr(importlib.import_module(module), name)():
        yield


def _owner(name: str) -> str:
    """`model.layers.0.self_attn` of `model.layers.0.self_attn.q_proj.bias`.

    A norm or the head is its own owner.
    """
    parts = name.split(".")
    return ".".join(parts[:4]) if "layers" in parts else ".".join(parts[:-1])


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _digest(tensor: Tensor) -> str:
    raw = _local(tensor).detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def _gather_objects(value: Any) -> list:
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out
