"""From stored parameters (DTensors) to what a forward computes with (local tensors)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(x: Tensor) -> Tensor:
    """The local tensor of a DTensor, differentiable; other tensors as they are.

    No placement is left partial in the gradient: whoever uses a replicated parameter on a part of
    the tokens or heads sums its gradient before it gets here.
    """
    return x.to_local() if isinstance(x, DTensor) else x


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
