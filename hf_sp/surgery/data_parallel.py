"""Data parallel ranks beside tp: FSDP2 over the shards.

Each decoder layer is one FSDP group and what surrounds the layers another, so that at most two
layers' shards of a tp rank are whole at a time. FSDP2 knows DTensors: a parameter that tp has split
becomes a DTensor of both axes, and is this rank's tp shard again while its layer runs. Gradients
are the mean over the groups, as FSDP and DDP have it.

Experts that are split over data parallel ranks too (``ep > tp``) are in no FSDP group.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from hf_sp.state import ParallelState
from hf_sp.surgery.swap import spread_experts


def shard_over_data(model: nn.Module, state: ParallelState, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to a model whose parameters are tp shards, in place.

    Collectives, over the data parallel ranks and for each layer: 1 all-gather of its weights before
    its forward and 1 before its backward, 1 reduce-scatter of its gradients; the weights around the
    layers stay gathered from the forward to the backward. None here.

    Args:
        model: the transformers model.
        state: its state.
        mesh: the data parallel ranks: 1-D to shard over, or 2-D (replicate, shard).
    """
    alone = set(spread_experts(model, state))
    for path in state.plan.layers:
        fully_shard(model.get_submodule(path), mesh=mesh, ignored_params=alone)
    fully_shard(model, mesh=mesh, ignored_params=alone)
