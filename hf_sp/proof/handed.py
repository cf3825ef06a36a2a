"""Hooks that hand one layer of a stack its hidden states, and take what it makes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.estimate import StepAccounting
from hf_sp.model.block import get_hidden_states, replace_hidden_states
from hf_sp.plan import Plan
from hf_sp.proof.pieces import Source
from hf_sp.proof.runs import LABELS


class _HandOn(torch.autograd.Function):
    """In place of all layers but the first: the last one's output; the gradient of the first's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, last: Tensor, gradient: Tensor, arrived: list[Tensor]
    ) -> Tensor:
        ctx.gradient, ctx.arrived = gradient, arrived
        return last.clone(memory_format=torch.preserve_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.arrived.append(grads[0])
        return ctx.gradient, None, None, None


@contextlib.contextmanager
def at_norm(model: Any, plan: Plan, last: Tensor, gradient: Tensor) -> Iterator[list[Tensor]]:
    """Inside, the final norm is given ``last``; the gradients that it sends."""
    arrived: list[Tensor] = []

    def hand_on(norm: nn.Module, args: Any) -> Any:
        return (_HandOn.apply(args[0], last, gradient, arrived), *args[1:])

    handle = model.get_submodule(plan.norm).register_forward_pre_hook(hand_on)
    try:
        yield arrived
    finally:
        handle.remove()


@dataclass
class Met:
    """What a layer was given and gave."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    marks: list[int]  # collectives before and after the layer


@contextlib.contextmanager
def at_layer(
    source: Source, layer: nn.Module, x: Tensor | None, accounting: StepAccounting | None = None
) -> Iterator[Met]:
    """Inside, the layer is given ``x``, if there is one."""
    met = Met([], [], [])

    def mark() -> None:
        met.marks += [] if accounting is None else [len(accounting.records)]

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        met.inputs.append(get_hidden_states(args, kwargs) if x is None else x)
        mark()
        return replace_hidden_states(args, kwargs, met.inputs[-1])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        source.returned = len(output) if isinstance(output, tuple) else 0
        met.outputs.append(output[0] if source.returned else output)
        mark()

    handles = (
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(leave),
    )
    try:
        yield met
    finally:
        for handle in handles:
            handle.remove()


def decode(model: Any, plan: Plan, inputs: dict[str, Any], x: Tensor | None) -> None:
    """Run the decoder; its tokens are not asked for where there is ``x``."""
    inner = {name: value for name, value in inputs.items() if name not in _NOT_INSIDE}
    if x is not None:
        inner = {k: v for k, v in inner.items() if k not in ("input_ids", "inputs_embeds")}
        inner["inputs_embeds"] = torch.zeros_like(x)
    model.get_submodule(plan.decoder)(**inner)


_NOT_INSIDE = (*LABELS, "num_items_in_batch", "logits_to_keep")
