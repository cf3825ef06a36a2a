"""Rank functions for what LocalTensorMode cannot show."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from hf_sp.comm import pairs
from hf_sp.comm.collectives import Axis


def concat_slice(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uneven pieces along the last dim: (result, want, gradient, want)."""
    axis = Axis.of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 3, sum(sizes), generator=generator, dtype=torch.float64)
    dy = torch.randn(2, 3, sum(sizes), generator=generator, dtype=torch.float64)
    x = whole.split(sizes, 2)[axis.rank].clone().requires_grad_()
    y = pairs.concat_slice(x, 2, sizes, axis)
    y.backward(dy)
    assert y.is_contiguous()
    return y.detach(), whole, x.grad, dy.split(sizes, 2)[axis.rank].clone()
