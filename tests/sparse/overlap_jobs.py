"""Rank functions: what runs while tokens travel, and who may not be able to tell."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import batches, tiny
from harness.compare import compare_gradients, compare_once, evaluating, fresh, gradients
from harness.parity import Case, pair, train
from harness.report import Report
from hf_sp.moe.flat import FlatEntry
from hf_sp.moe.shared import SharedBoundary
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_function

from hf_sp import parallel_state, parallelize
from hf_sp.errors import ConfigError
from hf_sp.estimate import count_step
from hf_sp.moe import beside
from hf_sp.moe import dispatcher as dispatch
from sparse.flight import Products, in_flight


def _parallel(dtype: torch.dtype = torch.float64, layers: int = 1, **kwargs: Any) -> nn.Module:
    model = tiny.build("qwen2_moe", dtype, num_hidden_layers=layers)
    parallel = parallelize(model, ep=dist.get_world_size(), **kwargs)
    while parallel_state(parallel).checks_left["training"]:
        parallel(**_batch())
    return parallel


def _batch() -> dict[str, Any]:
    return {**batches.plain(2, 16), "output_router_logits": False, "use_cache": False}


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """Shared experts that run where they are called."""
    with mock.patch.object(SharedBoundary, "_may_wait", return_value=False):
        yield


@contextlib.contextmanager
def _count_late() -> Iterator[list[int]]:
    """Notes shared experts that run later."""
    right, found = FlatEntry.wait_later, []

    def note(self: FlatEntry, output: Any) -> None:
        found.append(1)
        right(self, output)

    with mock.patch.object(FlatEntry, "wait_later", note):
        yield found


def train_in_flight(case: Case) -> Report:
    """`harness.parity.train`, where nothing may be read before its wait."""
    with in_flight():
        return train(case)


def order() -> dict[str, list[str]]:
    """Launches, waits and products of a step of one sparse layer with a shared expert."""
    parallel = _parallel()
    with in_flight() as forward, Products(forward):
        loss = parallel(**_batch()).loss
    with in_flight() as backward, Products(backward):
        loss.backward()
    return {"forward": forward.log, "backward": backward.log}


_UNWAITED: dict[str, tuple[Any, str, Any]] = {
    "shared gather": (beside.EarlyEntry, "arrive", lambda self: None),
    "shared exit": (beside.Crossing, "landed", lambda self: self.flying),
    "rows there": (
        dispatch.Route,
        "land_there",
        lambda self, launched: launched.index_select(0, self.arrived),
    ),
    "dx": (FlatEntry, "receive_later", lambda self, land: None),
}


def unwaited(what: str) -> bool:
    """Whether it shows that somebody does not wait."""
    parallel = _parallel()
    with in_flight(finish=False) as flight, mock.patch.object(*_UNWAITED[what]):
        parallel(**_batch()).loss.backward()
    found = [bool(grad.isfinite().all()) for grad in gradients(parallel).values()]
    return bool(flight.flying) or not all(found)


def cost(layers: int = 2) -> dict[str, Any]:
    """Bytes alive and at the peak of a step, and its collectives: shared experts later, at once."""
    found = {}
    for name, way in (("later", contextlib.nullcontext), ("at once", _at_once)):
        parallel = _parallel(torch.bfloat16, layers)
        with way(), _count_late() as late:
            count = count_step(lambda parallel=parallel: parallel(**_batch()).loss)
        calls = {kind: (c.calls, c.bytes) for kind, c in count.collectives.items()}
        found[name] = {"alive": count.alive_bytes, "calls": calls, "late": len(late)}
        found[name]["peak"] = count.peak_bytes
    return found


# --- uses ---------------------------------------------------------------------------------------


def _doubled(block: nn.Module) -> None:
    block.shared_expert.register_forward_hook(lambda module, args, output: 2 * output)


def _gradient_doubled(block: nn.Module) -> None:
    block.shared_expert.register_full_backward_pre_hook(lambda module, grads: (2 * grads[0],))


def _inside(block: nn.Module) -> None:
    block.shared_expert.act_fn.register_forward_hook(lambda module, args, output: 2 * output)


def _weights_frozen(block: nn.Module) -> None:
    block.shared_expert.requires_grad_(False)


def _down_alone(block: nn.Module) -> None:
    block.shared_expert.requires_grad_(False)
    block.shared_expert.down_proj.requires_grad_(True)


def _nothing(block: nn.Module) -> None:
    pass


# Hands on a block, and whether its shared expert still runs later.
HANDS: dict[str, tuple[Callable[[nn.Module], None], bool]] = {
    "none": (_nothing, True),
    "output": (_doubled, False),
    "gradient": (_gradient_doubled, False),
    "inside": (_inside, True),
    "frozen": (_weights_frozen, True),
    "down alone": (_down_alone, True),
}


def hands(kind: str, checkpoint: bool) -> Report:
    """Hooks and frozen weights, with collectives that are in flight until they are waited for."""
    hand, late = HANDS[kind]
    report = Report(f"{kind} checkpoint={checkpoint}", dist.get_rank(), "float64")
    case = Case("qwen2_moe", parallelize=(("ep", dist.get_world_size()),))
    with in_flight(), _count_late() as found:
        model, parallel = pair(case)
        if checkpoint:
            parallel.gradient_checkpointing_enable({"use_reentrant": False})
        for one in (model, parallel):
            for layer in one.model.layers:
                hand(layer.mlp)
        # A length that tp does not divide.
        compare_once(report, model, parallel, batches.plain(2, 17))
    if len(found) != late * 2 * (1 + checkpoint):
        report.problems.append(f"{len(found)} shared experts ran later")
    return report


class _Reentrant(nn.Module):
    """A module in a reentrant checkpoint of its own: its forward runs without autograd."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_function(self.inner, x, use_reentrant=True)


def in_a_checkpoint_of_its_own() -> Report:
    """The stand-in would have no gradient path there: it runs when it is called."""
    report = Report("a reentrant checkpoint", dist.get_rank(), "float64")
    with in_flight(), _count_late() as found:
        model, parallel = pair(Case("qwen2_moe", parallelize=(("ep", dist.get_world_size()),)))
        for one in (model, parallel):
            for layer in one.model.layers:
                layer.mlp.shared_expert = _Reentrant(layer.mlp.shared_expert)
        compare_once(report, model, parallel, batches.plain(2, 17))
    if found:
        report.problems.append(f"{len(found)} shared experts ran later")
    return report


def hooks_on_one_rank() -> str:
    """Somebody looks at one rank's shared expert: the ranks would launch in different orders."""
    parallel = parallelize(tiny.build("qwen2_moe"), ep=dist.get_world_size())
    if dist.get_rank() == 0:
        parallel.model.layers[1].mlp.shared_expert.register_forward_hook(lambda *_: None)
    try:
        parallel(**batches.plain(2, 17))
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


def lora(targets: tuple[str, ...]) -> Report:
    """`sparse.jobs:adapters`, with collectives in flight."""
    from sparse.jobs import adapters

    with in_flight(), _count_late() as found:
        report = adapters(dist.get_world_size(), targets)
    if len(found) != 2:
        report.problems.append(f"{len(found)} shared experts ran later")
    return report


def first_layer_frozen() -> Report:
    """Only the experts' down projections are trained: nobody asks for dx in the first block."""
    report = Report("down_proj alone", dist.get_rank(), "float64")
    model, parallel = pair(Case("qwen2_moe", parallelize=(("ep", dist.get_world_size()),)))
    for one in (model, parallel):
        for name, p in one.named_parameters():
            p.requires_grad_(name.endswith("experts.down_proj"))
    with in_flight():
        compare_once(report, model, parallel, batches.plain(2, 17))
    return report


def same_numbers(mode: str) -> tuple[bool, bool]:
    """Whether the loss is that of shared experts run at once, to the bit, and the gradients are."""
    dtype = torch.float32 if mode == "autocast" else torch.bfloat16
    parallel = _parallel(dtype, 2)
    results = []
    for way in (contextlib.nullcontext, _at_once):
        context: Any = {
            "no_grad": torch.no_grad,
            "inference": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
            "bfloat16": contextlib.nullcontext,
        }[mode]
        with way(), in_flight(), _count_late() as late:
            with context():
                loss = parallel(**_batch()).loss
            if loss.requires_grad:
                parallel.zero_grad(set_to_none=True)
                loss.backward()
        results.append((loss.detach().clone(), gradients(parallel), len(late)))
    (one, mine, late), (other, theirs, early) = results
    # The order of the sum of the block's input gradient is another.
    close = [(a - theirs[name]).norm() <= 2**-6 * theirs[name].norm() for name, a in mine.items()]
    return torch.equal(one, other), all(close) and (late, early) == (2, 0)


def copied() -> list[int]:
    """How many shared experts of a model, its deep copy, and one that is traced run later."""
    parallel = _parallel(layers=2)
    twin = copy.deepcopy(parallel)
    found = []
    for one in (parallel, twin):
        with _count_late() as late:
            one(**_batch())
        found.append(len(late))
    with (
        _count_late() as late,
        mock.patch.object(torch.compiler, "is_compiling", return_value=True),
    ):
        parallel(**_batch())
    return [*found, len(late)]


class InterruptedForwardError(Exception):
    """Raised in a forward."""


def interrupted(where: str) -> Report:
    """A forward that raises between the shared expert's call and its run leaves nothing behind."""
    report = Report(f"interrupted in {where}", dist.get_rank(), "float64")
    model, parallel = pair(Case("qwen2_moe", parallelize=(("ep", dist.get_world_size()),)))

    def stop(*args: Any, **kwargs: Any) -> None:
        raise InterruptedForwardError

    block = parallel.model.layers[0].mlp
    module = {"router": block.gate, "shared": block.shared_expert.down_proj}[where]
    handle = module.register_forward_hook(stop)
    with in_flight():
        for _ in range(2):
            try:
                parallel(**batches.plain(2, 17))
                report.problems.append("nothing was raised")
            except InterruptedForwardError:
                pass
    handle.remove()
    boundaries = {
        hook.__self__
        for one in (block, block.shared_expert)
        for hook in one._forward_pre_hooks.values()
    }
    if any(boundary.entries for boundary in boundaries) or len(boundaries) != 2:
        report.problems.append("an entry is left")
    compare_once(report, model, parallel, batches.plain(2, 17))
    return report


def _double(module: nn.Module, args: tuple) -> None:
    args[0].mul_(2)


def written_between() -> Report:
    """A pre-hook of the router writes into the tokens: autograd bears that in evaluation only."""
    report = Report("written between", dist.get_rank(), "float64")
    model, parallel = pair(Case("qwen2_moe", parallelize=(("ep", dist.get_world_size()),)))
    for one in (model, parallel):
        for layer in one.model.layers:
            layer.mlp.gate.register_forward_pre_hook(_double)
    with evaluating(model, parallel), in_flight(), _count_late() as late:
        want, got = (one(**batches.plain(2, 17)).logits for one in (model, parallel))
    report.compare("logits", got, want)
    if late:
        report.problems.append("a gather was in flight")
    return report


def written_behind() -> str:
    """A forward hook of the router that writes into its argument."""
    parallel = _parallel()

    def write(module: nn.Module, args: tuple, output: Any) -> None:
        with torch.no_grad():
            args[0].mul_(2)

    parallel.model.layers[0].mlp.gate.register_forward_hook(write)
    try:
        parallel(**_batch())
    except ConfigError as error:
        return str(error)
    return "nothing was refused"


class _Half(torch.autograd.Function):
    """Somebody's own function of the shared expert's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 2


def block_of_another_form(when: str, form: str) -> Any:
    """A block that hands the shared expert's output to an autograd Function, or uses it early.

    Changed before ``parallelize``, which sees it, or behind its back.
    """
    model, parallel = (tiny.build("qwen2_moe", num_hidden_layers=1) for _ in range(2))
    mixed = type(model.model.layers[0].mlp)

    class Other(mixed):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.view(-1, x.shape[-1])
            shared = self.shared_expert(flat)
            shared = shared / 2 if form == "early" else shared
            _, scale, index = self.gate(flat)
            routed = self.experts(flat, index, scale)
            shared = _Half.apply(shared) if form == "function" else shared
            shared = self.shared_expert_gate(flat).sigmoid() * shared
            return (routed + shared).view(x.shape)

    model.model.layers[0].mlp.__class__ = Other
    if when == "before":
        parallel.model.layers[0].mlp.__class__ = Other
    parallel = parallelize(parallel, ep=dist.get_world_size())
    parallel.model.layers[0].mlp.__class__ = Other
    report = Report(f"{when} {form}", dist.get_rank(), "float64")
    tiny.reference(model)
    with in_flight(finish=False), _count_late() as late:
        try:
            outputs = [one(**fresh(_batch())) for one in (model, parallel)]
            for output in outputs:
                output.loss.backward()
        except ConfigError as error:
            return str(error)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    if len(late) != (when == "behind"):
        report.problems.append(f"{len(late)} shared experts ran later")
    return report
