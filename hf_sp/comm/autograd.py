"""What all autograd Functions of hf_sp share: a direct call, and no second derivative.

torch's own ``once_differentiable`` notices a second derivative only where the incoming gradient
depends on something. A weight's gradient depends on the saved input as well. Here every gradient
that is made while autograd records (``create_graph=True``) refuses to be differentiated.

Must not know what the passes compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_sp.errors import ConfigError


class Node(torch.autograd.Function):
    """Base of hf_sp's autograd Functions: ``apply`` without torch's Python in front of it.

    That serves functorch transforms and ``setup_context``, at about a Python call an argument.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run the forward and record the node."""
        if torch.compiler.is_compiling():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ConfigError(
            "hf_sp's functions have no second derivative",
            got="the gradient of a gradient that was made with create_graph=True",
            rule="their backward passes are not recorded",
            remedy="leave the parallelized part out of what is differentiated twice",
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the ``backward`` of an autograd Function.

    Inside nothing is recorded; what it returns raises a ConfigError when it is differentiated.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        made = [x for x in several if isinstance(x, Tensor)]
        # An anchor that needs a gradient makes the outputs part of a graph, whatever came in.
        refusing = iter(_Refuse.apply(torch.empty(0, requires_grad=True), *made))
        several = tuple(next(refusing) if isinstance(x, Tensor) else x for x in several)
        return several if isinstance(outputs, tuple) else several[0]

    return wrapper
