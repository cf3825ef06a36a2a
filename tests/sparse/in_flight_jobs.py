"""Rank functions: collectives that are in flight until their wait, and hands on a shared expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import batches, tiny
from harness.compare import compare_gradients, compare_once, evaluating, fresh, gradients
from harness.parity import Case, pair, train
from harness.report import Report
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_function

from hf_sp import parallel_state, parallelize
from hf_sp.moe.dispatcher import Dispatcher
from sparse.flight import in_flight


def _parallel(dtype: torch.dtype = torch.float64, layers: int = 1, **kwargs: Any) -> nn.Module:
    model = tiny.build("qwen2_moe", dtype, num_hidden_layers=layers)
    parallel = parallelize(model, ep=dist.get_world_size(), **kwargs)
    while parallel_state(parallel).checks_left["training"]:
        parallel(**_batch())
    return parallel


def _batch() -> dict[str, Any]:
    return {**batches.plain(2, 16), "output_router_logits": False, "use_cache": False}


def train_in_flight(case: Case) -> Report:
    """`harness.parity.train`, where nothing may be read before its wait."""
    with in_flight():
        return train(case)


_UNWAITED: dict[str, tuple[Any, str, Any]] = {
    "rows there": (
        Dispatcher,
        "land_dispatch",
        lambda self, launched: launched.index_select(0, self.places),
    ),
    "rows back": (Dispatcher, "land_combine", lambda self, launched: launched),
}


def unwaited(what: str) -> bool:
    """Whether it shows that somebody does not wait."""
    parallel = _parallel()
    with in_flight(finish=False) as flight, mock.patch.object(*_UNWAITED[what]):
        parallel(**_batch()).loss.backward()
    found = [bool(grad.isfinite().all()) for grad in gradients(parallel).values()]
    return bool(flight.flying) or not all(found)


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


HANDS: dict[str, Callable[[nn.Module], None]] = {
    "none": _nothing,
    "output": _doubled,
    "gradient": _gradient_doubled,
    "inside": _inside,
    "frozen": _weights_frozen,
    "down alone": _down_alone,
}


def hands(kind: str, checkpoint: bool) -> Report:
    """Hooks and frozen weights, with collectives that are in flight until they are waited for."""
    report = Report(f"{kind} checkpoint={checkpoint}", dist.get_rank(), "float64")
    case = Case("qwen2_moe", parallelize=(("ep", dist.get_world_size()),))
    with in_flight():
        model, parallel = pair(case)
        if checkpoint:
            parallel.gradient_checkpointing_enable({"use_reentrant": False})
        for one in (model, parallel):
            for layer in one.model.layers:
                HANDS[kind](layer.mlp)
        # A length that tp does not divide.
        compare_once(report, model, parallel, batches.plain(2, 17))
    return report


class _Reentrant(nn.Module):
    """A module in a reentrant checkpoint of its own: its forward runs without autograd."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_function(self.inner, x, use_reentrant=True)


def in_a_checkpoint_of_its_own() -> Report:
    """A shared expert in a checkpoint inside its block."""
    report = Report("a reentrant checkpoint", dist.get_rank(), "float64")
    with in_flight():
        model, parallel = pair(Case("qwen2_moe", parallelize=(("ep", dist.get_world_size()),)))
        for one in (model, parallel):
            for layer in one.model.layers:
                layer.mlp.shared_expert = _Reentrant(layer.mlp.shared_expert)
        compare_once(report, model, parallel, batches.plain(2, 17))
    return report


def lora(targets: tuple[str, ...]) -> Report:
    """`sparse.jobs:adapters`, with collectives in flight."""
    from sparse.jobs import adapters

    with in_flight():
        report = adapters(dist.get_world_size(), targets)
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
    inputs = [block.experts.forward.__self__.block, block.shared_expert.down_proj.block]
    if any(one.gathered is not None for one in inputs):
        report.problems.append("an input is left")
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
    with evaluating(model, parallel), in_flight():
        want, got = (one(**batches.plain(2, 17)).logits for one in (model, parallel))
    report.compare("logits", got, want)
    return report


class _Half(torch.autograd.Function):
    """Somebody's own function of the shared expert's output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 2


def block_of_another_form(form: str) -> Report:
    """A block that hands the shared expert's output to an autograd Function, or uses it early.

    Changed after ``parallelize``, which would have refused it.
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
    parallel = parallelize(parallel, ep=dist.get_world_size())
    parallel.model.layers[0].mlp.__class__ = Other
    report = Report(form, dist.get_rank(), "float64")
    tiny.reference(model)
    with in_flight():
        for one in (model, parallel):
            one(**fresh(_batch())).loss.backward()
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report
