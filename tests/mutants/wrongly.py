"""What mutants are made of: wrong collectives and wrong gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_sp.comm import collectives as comm
from mutants.registry import Patch


def own_part(x: torch.Tensor, axis: comm.Axis) -> torch.Tensor:
    """A reduce-scatter that forgets to reduce."""
    return x.chunk(axis.size)[axis.rank].clone()


def own_copies(x: torch.Tensor, axis: comm.Axis) -> torch.Tensor:
    """An all-gather that shows every rank only its own part."""
    return torch.cat([x] * axis.size)


def rolled(x: torch.Tensor, axis: comm.Axis) -> torch.Tensor:
    """An all-gather in the wrong rank order."""
    return comm.wait(comm.launch_all_gather(x, axis)).roll(x.shape[0], 0)


def averaged(function: Callable) -> Callable:
    """The mean over the ranks instead of their sum."""
    return lambda x, axis, *rest: function(x, axis, *rest) / axis.size


def backward(cls: type, grads: Callable[..., Any]) -> Patch:
    """Another backward of an autograd function."""
    return (cls, "backward", staticmethod(grads))


def scaled(factor: float) -> Any:
    """An identity whose gradient is scaled."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * factor

    return Scaled
