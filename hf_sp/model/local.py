"""From what is stored to what a forward computes with here: tensors of DTensors, a config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.errors import ConfigError
from hf_sp.torch_private import dtensor_of, local_tensor, spec_of


class _Local(Node):
    """torch's ``to_local`` at a sixth of its cost: the gradient's spec is the parameter's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.spec = spec_of(x)
        # No gradient stays none: zeros would be a step of weight decay for what was not used.
        ctx.set_materialize_grads(False)
        tensor = local_tensor(x)
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None if grads[0] is None else dtensor_of(grads[0], ctx.spec)


class _AveragedGradient(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.count = count
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None if grads[0] is None else grads[0] / ctx.count, None


def local(x: Tensor) -> Tensor:
    """The local tensor of a DTensor, differentiable; other tensors as they are.

    No placement is left partial in the gradient: whoever uses a replicated parameter on a part of
    the tokens or heads sums its gradient before it gets here.

    Raises:
        ConfigError: FSDP has this rank's part of a part here, as it has between two forwards.
    """
    if not isinstance(x, DTensor):
        return x
    check_gathered(x)
    if torch.compiler.is_compiling():
        return x.to_local()
    return _Local.apply(x) if x.requires_grad and torch.is_grad_enabled() else local_tensor(x)


def check_gathered(x: DTensor) -> None:
    """Refuse (ConfigError) a parameter with more axes than tp: FSDP has not gathered it."""
    if len(spec_of(x).placements) > 1:
        raise ConfigError(
            "a module of a model with data parallel ranks was called outside the model's forward",
            got=f"a weight {tuple(x.shape)} sharded over {x.device_mesh.mesh_dim_names}",
            rule="FSDP gathers weights over the data parallel ranks for the forward of the whole "
            "model that was given to parallelize, and of each decoder layer inside it",
            remedy="call that model: output_hidden_states=True gives what is inside, and "
            "p.full_tensor() a whole weight",
        )


def local_of_groups(x: Tensor, count: int) -> Tensor:
    """As ``local``, for what is sharded over all ranks and FSDP leaves alone.

    Its gradient is a sum over the tokens of ``count`` groups, and leaves as their mean.

    Shapes:   a DTensor -> its local tensor
    Forward, backward: no collective
    Saves:    nothing
    """
    return _AveragedGradient.apply(x.to_local() if isinstance(x, DTensor) else x, count)


def cast_for_autocast(x: Tensor, like: Tensor) -> Tensor:
    """Cast as autocast does before a linear; it does not look into our Functions.

    The autocast state of the device of ``like`` counts.
    """
    dtype = autocast_dtype(like)
    return x if dtype is None or x.dtype == dtype or x.dtype not in _CAST else x.to(dtype)


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes linears in on the device of ``like``; None if it is off."""
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


# As autocast: double precision is left alone.
_CAST = (torch.float32, torch.float16, torch.bfloat16)


def call_through(module: nn.Module, call: Callable[..., Any]) -> None:
    """Put a function around a module's calls, hooks and all: ``call(inner, *args, **kwargs)``.

    Its class is replaced by one of the same name. Later ones are around those before.
    """
    kind: Any = type(module)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        around = self.__dict__["around_calls"][kind]
        return around(functools.partial(kind.__call__, self), *args, **kwargs)

    module.__dict__.setdefault("around_calls", {})[kind] = call
    names = {"__module__": kind.__module__, "__call__": called}
    module.__class__ = type(kind.__name__, (kind,), names)


class LocalConfig:
    """A config with other values of some names; for the rest it is that config, also later."""

    def __init__(self, config: Any, **local: Any) -> None:
        self.__dict__.update(local, whole=config)

    def __getattr__(self, name: str) -> Any:
        # A copy is without its attributes at first.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["whole"], name)
