"""The norm of a parallelized model's gradients, whatever they are spread over. Knows torch only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def grad_norm(parameters: nn.Module | Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The total norm of gradients, as ``torch.nn.utils.clip_grad_norm_`` returns it; clips nothing.

    Plain tensors (a head of one's own beside the model) may be among the parameters, and experts
    that are split over other ranks. What is replicated counts once.

    To be called on every rank.

    Args:
        parameters: a model, or parameters; those without a gradient do not count.
        norm_type: of the norm, ``inf`` for the largest element.

    Returns:
        A plain tensor, the same on all ranks that hold a part of the parameters.

    Collectives: 1 all-reduce of a number for each mesh that gradients are spread over.
    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    groups: dict[Any, list[Tensor]] = {}
    for p in parameters:
        if p.grad is not None:
            mesh = p.grad.device_mesh if isinstance(p.grad, DTensor) else None
            groups.setdefault(mesh, []).append(p.grad)
    norms = [torch.nn.utils.get_total_norm(group, norm_type) for group in groups.values()]
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in norms]
    if not whole:
        return torch.tensor(0.0)
    return torch.linalg.vector_norm(torch.stack([x.to(whole[0]) for x in whole]), norm_type)
