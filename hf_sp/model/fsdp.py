"""Data parallel ranks beside tp: FSDP2 over the shards.

Each decoder layer is one FSDP group and what surrounds the layers another. A parameter that tp has
split becomes a DTensor of all axes, and is this rank's tp shard again while its layer runs.
Gradients are the mean over the groups of ranks, as FSDP and DDP have it.

Experts that are split over data parallel ranks too (``ep > tp``) are in no FSDP group.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from hf_sp.errors import ConfigError
from hf_sp.model.shard import spread_experts
from hf_sp.state import ParallelState
from hf_sp.torch_private import graph_task


def shard_over_data(model: nn.Module, state: ParallelState, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to a model whose parameters are tp shards, in place.

    Collectives in a step, over the data parallel ranks: for each layer, and for what surrounds
    them, 1 all-gather of the weights before the forward and 1 before the backward, 1 reduce-scatter
    of the gradients. Here: 1 all-gather each.

    Args:
        model: the transformers model.
        state: its state.
        mesh: the data parallel ranks: 1-D to shard over, or 2-D (replicate, shard).
    """
    alone = set(spread_experts(model, state))
    layers = [model.get_submodule(path) for path in state.plan.layers]
    # Resharded after the forward, the root too: left gathered by a forward without a backward (an
    # evaluation), its parameters would be others than the optimizer's until the next backward.
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=alone)
    if not any(p.is_meta for p in model.parameters()):
        make_buffers(model, state)
    for layer in layers:
        layer.register_forward_pre_hook(functools.partial(_inside_only, state), prepend=True)


def make_buffers(model: nn.Module, state: ParallelState) -> None:
    """Have FSDP make its buffers now: made in inference mode, training could not use them.

    Collectives: 1 all-gather for each layer, and 1 for what surrounds them.
    """
    for module in (model, *map(model.get_submodule, state.plan.layers)):
        assert isinstance(module, FSDPModule)
        module.unshard()
        module.reshard()


def _inside_only(state: ParallelState, layer: nn.Module, args: Any) -> None:
    """Refuse a call of a layer from outside: FSDP would take it for a root of its own."""
    # A checkpoint's recomputation runs inside of a backward.
    if state.length is None and not torch.compiler.is_compiling() and graph_task() < 0:
        raise ConfigError(
            "a layer of a model with data parallel ranks was called by itself",
            where=type(layer).__name__,
            rule="FSDP gathers weights layer by layer for a forward of the whole model",
            remedy="call the model; output_hidden_states=True gives what is inside",
        )
