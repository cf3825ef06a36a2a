"""``torch.nn.utils.clip_grad_norm_`` and parallelized models: the norm is whole on every rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad

from hf_sp.patching import Patch, Patches

PATCHES = Patches(lambda _: True)
"""Patches that look at the result."""


@PATCHES.on(clip_grad, "_get_total_norm")
def return_whole_norm(original: Patch, *args: Any, **kwargs: Any) -> Tensor:
    """Torch returns a DTensor: what one rank alone makes of it for its log waits for the others.

    Reduced when all ranks clip; the clipping itself would do it.
    """
    norm = original(*args, **kwargs)
    if not (isinstance(norm, DTensor) and "tp" in (norm.device_mesh.mesh_dim_names or ())):
        return norm
    whole = norm.full_tensor()
    # Loops that were written for a DTensor ask for this.
    whole.full_tensor = whole.detach().clone  # type: ignore[attr-defined]
    return whole
