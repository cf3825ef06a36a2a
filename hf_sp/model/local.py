"""From stored parameters (DTensors) to what a forward computes with (local tensors)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_sp.comm.autograd import once_differentiable
from hf_sp.errors import ConfigError


def local(x: Tensor) -> Tensor:
    """The local tensor of a DTensor, differentiable; other tensors as they are.

    No placement is left partial in the gradient: whoever uses a replicated parameter on a part of
    the tokens or heads sums its gradient before it gets here.

    Raises:
        ConfigError: FSDP has this rank's part of a part here, as it has between two forwards.
    """
    if not isinstance(x, DTensor):
        return x
    if x.device_mesh.ndim > 1:
        raise ConfigError(
            "a module of a model with data parallel ranks was called outside the model's forward",
            got=f"a weight {tuple(x.shape)} sharded over {x.device_mesh.mesh_dim_names}",
            rule="FSDP gathers weights over the data parallel ranks for the forward of the whole "
            "model that was given to parallelize, and of each decoder layer inside it",
            remedy="call that model: output_hidden_states=True gives what is inside, and "
            "p.full_tensor() a whole weight",
        )
    return x.to_local()


class _AveragedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> Tensor:
        ctx.count = count
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] / ctx.count, None


def local_of_groups(x: Tensor, count: int) -> Tensor:
    """As ``local``, for what is sharded over all ranks and FSDP leaves alone.

    Its gradient is a sum over the tokens of ``count`` groups, and leaves as their mean.

    Shapes:   a DTensor -> its local tensor
    Forward:  no collective
    Backward: no collective
    Saves:    nothing
    """
    return _AveragedGradient.apply(x.to_local() if isinstance(x, DTensor) else x, count)


def cast_for_autocast(x: Tensor, like: Tensor) -> Tensor:
    """Cast as autocast would before a linear; autocast itself does not look into our Functions.

    Args:
        x: tensor to cast.
        like: a tensor on the device whose autocast state counts.
    """
    device = like.device.type
    if not torch.is_autocast_enabled(device) or not x.is_floating_point():
        return x
    # As autocast: double precision is left alone.
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))
