"""How a tensor is computed again in backward, instead of being saved.

A norm's output and the MLP's gated product are cheap functions of tensors that are saved anyway.
Who computes one attaches its ``Recompute``; who would save it saves the inputs of that instead.
Void after a write into the tensor or an input; it does not follow through an operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sp.torch_private import version

_RECOMPUTE = "_hf_sp_recompute"


@dataclass(frozen=True, slots=True)
class Recompute:
    """A tensor as a function of others, with their gradient paths.

    ``function`` gives the same bits each time, and holds no tensor itself. ``row_linear``: a row
    linear of the inputs instead of the tensor, if there is one.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    row_linear: Callable[..., Tensor] | None = None


def attach_recompute(x: Tensor, recompute: Recompute) -> None:
    """Let whoever would save ``x`` save its inputs."""
    setattr(x, _RECOMPUTE, (_versions(x, recompute), recompute))


def recompute_of(x: Tensor) -> Recompute | None:
    """What ``x`` can be computed from again, if that is known and still holds."""
    if torch.compiler.is_compiling():
        return None
    written, recompute = getattr(x, _RECOMPUTE, (None, None))
    return recompute if recompute is not None and written == _versions(x, recompute) else None


def saved_form(x: Tensor) -> tuple[Callable[..., Tensor] | None, tuple[Tensor, ...]]:
    """What a node saves of an input: ``(None, (x,))``, or a function and its inputs."""
    recompute = recompute_of(x)
    return (None, (x,)) if recompute is None else (recompute.function, recompute.inputs)


def restored(function: Callable[..., Tensor] | None, saved: Any) -> Tensor:
    """The tensor again, from what ``saved_form`` has given."""
    return saved[0] if function is None else function(*saved)


def _versions(x: Tensor, recompute: Recompute) -> list[int | None]:
    return [version(x), *map(version, recompute.inputs)]
