"""Rank functions: what stands in for a module's forward, under the hands of users."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from harness import batches
from harness.compare import compare_gradients, gradients
from harness.parity import Case, each, pair
from harness.report import Report
from torch import Tensor, nn

from hf_sp import parallelize
from hf_sp.model.mlp import SwiGLUForward
from hf_sp.model.norm import NormForward

CASE = Case("llama_bias")


def users(names: list[str]) -> dict[str, Report]:
    """Each of ``USES`` on both models; every gradient is compared."""
    return each(CASE, names, _use)


def _use(report: Report, name: str) -> None:
    model, parallel = pair(CASE)
    batch = batches.plain(2, 17)
    seen = []
    for one in (model, parallel):
        with USES[name](one) as notes:
            one(**batch).loss.backward()
        seen.append(notes)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    if len(seen[0]) != len(seen[1]):
        report.problems.append(f"hooks ran {len(seen[1])} times, want {len(seen[0])}")


Use = Callable[[nn.Module], contextlib.AbstractContextManager[list]]


def _layer(model: nn.Module) -> Any:
    return model.model.layers[0]


@contextlib.contextmanager
def _hooked(module: nn.Module, hook: Callable[..., Any], kind: str = "forward") -> Iterator[list]:
    notes: list = []

    def noting(*args: Any) -> Any:
        notes.append(1)
        return hook(*args)

    handle = getattr(module, f"register_{kind}_hook")(noting)
    yield notes
    handle.remove()


def _in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    # Written into after it was made: it can not be made again from what the norm has saved.
    output.detach().mul_(1.5)


def _by_data(module: nn.Module, args: Any, output: Tensor) -> None:
    output.data.mul_(1.5)


@contextlib.contextmanager
def _retained(model: nn.Module) -> Iterator[list]:
    """The product's gradient is watched, and has to arrive."""
    grads: list = []

    def watch(module: nn.Module, args: tuple) -> None:
        args[0].register_hook(lambda grad: grads.append(tuple(grad.shape)))

    handle = _layer(model).mlp.down_proj.register_forward_pre_hook(watch)
    yield grads
    handle.remove()


@contextlib.contextmanager
def _product_scaled(model: nn.Module) -> Iterator[list]:
    handle = _layer(model).mlp.down_proj.register_forward_pre_hook(
        lambda module, args: (args[0] * 1.5,)
    )
    yield []
    handle.remove()


@contextlib.contextmanager
def _frozen(model: nn.Module, part: str) -> Iterator[list]:
    for name, p in model.named_parameters():
        p.requires_grad_(part not in name)
    yield []


@contextlib.contextmanager
def _other_settings(model: nn.Module) -> Iterator[list]:
    """What is set after parallelize counts."""
    _layer(model).mlp.act_fn = nn.GELU()
    _layer(model).input_layernorm.variance_epsilon = 0.3
    yield []


@contextlib.contextmanager
def _watched_afterwards(model: nn.Module) -> Iterator[list]:
    """A hook behind the down projection changes the gradient of what went in."""

    def watch(module: nn.Module, args: tuple, output: Tensor) -> None:
        args[0].register_hook(lambda grad: 3 * grad)

    handle = _layer(model).mlp.down_proj.register_forward_hook(watch)
    yield []
    handle.remove()


@contextlib.contextmanager
def _input_written(model: nn.Module) -> Iterator[list]:
    """The norm's input is written into, and nothing but q_proj would notice."""
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)

    def write(module: nn.Module, args: tuple, output: Tensor) -> None:
        args[0].detach().add_(0.5)

    handle = _layer(model).input_layernorm.register_forward_hook(write)
    yield []
    handle.remove()


USES: dict[str, Use] = {
    "product watched afterwards": _watched_afterwards,
    "norm input written into": _input_written,
    "norm output written into by data": lambda m: _hooked(_layer(m).input_layernorm, _by_data),
    "settings changed afterwards": _other_settings,
    "activation hook": lambda m: _hooked(_layer(m).mlp.act_fn, lambda module, args, out: out * 1.5),
    "activation backward hook": lambda m: _hooked(
        _layer(m).mlp.act_fn, lambda module, grads, outs: None, "full_backward"
    ),
    "norm output written into": lambda m: _hooked(_layer(m).input_layernorm, _in_place),
    "norm output replaced": lambda m: _hooked(
        _layer(m).post_attention_layernorm, lambda module, args, out: out * 1.5
    ),
    "norm backward hook": lambda m: _hooked(
        _layer(m).input_layernorm, lambda module, grads, outs: None, "full_backward"
    ),
    "down backward hook": lambda m: _hooked(
        _layer(m).mlp.down_proj, lambda module, grads, outs: None, "full_backward"
    ),
    "product's gradient watched": _retained,
    "product replaced": _product_scaled,
    "norms frozen": lambda m: _frozen(m, "norm"),
    "MLP frozen": lambda m: _frozen(m, "mlp"),
    "down frozen": lambda m: _frozen(m, "down_proj"),
    "gate frozen": lambda m: _frozen(m, "gate_proj"),
    "all but the norms frozen": lambda m: _frozen(m, "proj"),
}


def forwards(**options: Any) -> list[str]:
    """Names of the stand-ins of a copied model's first layer and final norm, by kind."""
    model, _ = pair(CASE)
    parallel = copy.deepcopy(parallelize(model, **options))
    first = parallel.model.layers[0]
    kinds = []
    for module in (first.input_layernorm, first.mlp, parallel.model.norm):
        forward = vars(module).get("forward")
        if isinstance(forward, NormForward | SwiGLUForward):
            # The copy's stand-in works on the copy.
            assert forward.module is module
            kinds.append(f"{type(forward).__name__} {forward.recompute}")
        else:
            kinds.append(type(forward).__name__)
    return kinds
