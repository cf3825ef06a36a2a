"""Data parallel ranks beside tp: FSDP2 over the shards.

Each decoder layer is one FSDP group and what surrounds the layers another; adapters that come later
are one of each block. A parameter that tp has split becomes a DTensor of all axes, and is this
rank's tp shard again while its layer runs.
Gradients are the mean over the groups of ranks, as FSDP and DDP have it.

Experts that are split over data parallel ranks too (``ep > tp``) are in no FSDP group.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from hf_sp.errors import ConfigError
from hf_sp.model.block import get_hidden_states
from hf_sp.model.recompute import Recompute, attach_recompute, recompute_of
from hf_sp.model.shard import spread_experts
from hf_sp.state import ATTRIBUTE, ParallelState
from hf_sp.torch_packed import is_packed
from hf_sp.torch_private import graph_task, real_tensors


def shard_over_data(model: nn.Module, state: ParallelState, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to a model whose parameters are tp shards, in place.

    Collectives in a step, over the data parallel ranks: for each layer, and for what surrounds
    them, 1 all-gather of the weights before the forward and 1 before the backward, 1 reduce-scatter
    of the gradients. Here: none.

    Args:
        model: the transformers model.
        state: its state.
        mesh: the data parallel ranks: 1-D to shard over, or 2-D (replicate, shard).
    """
    alone = set(spread_experts(model, state))
    layers = [model.get_submodule(path) for path in state.plan.layers]
    # Resharded after the forward, the root too: left gathered by a forward without a backward (an
    # evaluation), its parameters would be others than the optimizer's until the next backward.
    _shard((*layers, model), mesh, alone, state)
    for layer in layers:
        layer.register_forward_pre_hook(functools.partial(_inside_only, state), prepend=True)
    _Buffers(model).install()


def shard_blocks_over_data(model: nn.Module, state: ParallelState) -> None:
    """Shard what is new in the blocks of a model that FSDP has sharded: adapters.

    Collectives in a step: for each block as for a layer.
    """
    axes = [n for n in state.whole.mesh_dim_names or () if n != "tp"]
    mesh = state.whole[tuple(axes)]
    known: set[nn.Parameter] = {
        p for p in model.parameters() if isinstance(p, DTensor) and p.device_mesh.ndim > 1
    }
    known |= set(spread_experts(model, state))
    blocks = [model.get_submodule(block.path) for block in state.plan.blocks]
    blocks = [block for block in blocks if set(block.parameters()) - known]
    # A block's exit is a view, which a layer adds to the residual and does not write into.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)
    kept = [_KeptInput() for _ in blocks]
    for block, hooks in zip(blocks, kept, strict=True):
        block.register_forward_pre_hook(hooks.give_back, with_kwargs=True, prepend=True)
    _shard(blocks, mesh, known, state)
    _Buffers(model).install()
    for block, hooks in zip(blocks, kept, strict=True):
        block.register_forward_pre_hook(hooks.note, with_kwargs=True, prepend=True)


class _KeptInput:
    """Hooks around FSDP's on a block: how its input is computed again follows through them.

    In a checkpoint's recomputation FSDP leaves the input alone: both have to save the same.
    """

    recompute: Recompute | None = None

    def note(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before FSDP's hook."""
        self.recompute = recompute_of(get_hidden_states(args, kwargs))

    def give_back(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """After it."""
        recompute, self.recompute = self.recompute, None
        if recompute is not None:
            attach_recompute(get_hidden_states(args, kwargs), recompute)


def _beside_packed(p: nn.Parameter) -> Shard | None:
    """Another dim than the one whose parts tp has split: two strided shards of one do not join."""
    packed = isinstance(p, DTensor) and any(is_packed(of) and of.dim == 0 for of in p.placements)
    return Shard(1) if packed else None


def _shard(
    modules: Sequence[nn.Module],
    mesh: DeviceMesh,
    ignored: set[nn.Parameter],
    state: ParallelState,
) -> None:
    for module in modules:
        precision = state.mp_policy
        if module.__dict__.get(ATTRIBUTE) is None:
            # What a layer or a block returns goes to the next, in that one's dtype.
            precision = dataclasses.replace(precision, output_dtype=None)
        with real_tensors():  # FSDP joins meshes, and reads their tables of ranks
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=True,
                mp_policy=precision,
                offload_policy=state.offload_policy,
                ignored_params=ignored,
                shard_placement_fn=_beside_packed,
            )
    for module in modules:
        # Trainer and others go by the name of a model's class, which FSDP derives one from.
        kind = type(module)
        kind.__name__ = kind.__bases__[-1].__name__


class _Buffers:
    """A hook of the first forward: FSDP's buffers, made in inference mode, could not be trained in.

    In any other mode FSDP makes them as it goes.
    Collectives, in inference mode: those of ``make_buffers``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def install(self) -> None:
        """Before FSDP's own."""
        self.handle = self.model.register_forward_pre_hook(self.make, prepend=True)

    def make(self, model: nn.Module, args: Any) -> None:
        """And be gone."""
        self.handle.remove()
        if not torch.is_inference_mode_enabled():
            return
        with torch.inference_mode(False):
            make_buffers(model)


def make_buffers(model: nn.Module) -> None:
    """Have FSDP make its buffers now.

    Collectives: 1 all-gather for each group.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
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
