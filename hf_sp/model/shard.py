"""Full parameters to DTensors, and HF modules to parallel ones, in place.

Owns the placement of every parameter. Modules keep their identity, name and hooks; parameters keep
their names and stay tied. Nothing here communicates but ``agree_on_weights``.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from hf_sp.comm import collectives as comm
from hf_sp.comm.collectives import Axis
from hf_sp.comm.shard import as_dtensor, take_shard
from hf_sp.errors import PlanError
from hf_sp.plan.schema import Plan
from hf_sp.state import ParallelState
from hf_sp.torch_private import is_fake, packed_halves, process_group


def placements(model: nn.Module, plan: Plan) -> dict[int, tuple[str, Placement]]:
    """``id(parameter) -> (name, placement)`` for every parameter of the model.

    Raises:
        PlanError: one tied parameter would have to be split in two ways.
    """
    wanted: dict[str, Placement] = {}
    for block in plan.blocks:
        for leaf in block.leaves:
            if leaf.style == "column":
                wanted[f"{leaf.path}.weight"] = wanted[f"{leaf.path}.bias"] = Shard(0)
            elif leaf.style == "row":
                wanted[f"{leaf.path}.weight"] = Shard(1)
        experts = block.experts
        if experts is not None:
            features = experts.split == "features"
            wanted[f"{experts.path}.gate_up_proj"] = packed_halves(1) if features else Shard(0)
            wanted[f"{experts.path}.down_proj"] = Shard(2 if features else 0)
    for path in filter(None, (plan.embedding, plan.head)):
        wanted[f"{path}.weight"] = wanted[f"{path}.bias"] = Shard(0)
    placed: dict[int, tuple[str, Placement]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        placement = wanted.get(name, Replicate())
        first, earlier = placed.setdefault(id(p), (name, placement))
        if earlier != placement:
            raise PlanError(
                "a tied weight would have to be split in two ways",
                where=f"{first} and {name}",
                got=f"{earlier} and {placement}",
                rule="tied weights stay one tensor",
            )
    return placed


def agree_on_weights(model: nn.Module, axis: Axis, device_type: str) -> list[str]:
    """Make every rank's parameters and buffers those of the first rank, as DDP does.

    Ranks that built the model from different seeds would each shard another model. Digests are
    compared first, so that equal weights (the usual case) cost one small all-gather.

    Returns:
        Names of the tensors that differed and were taken from the first rank.
    """
    group = process_group(axis.group)
    everything = itertools.chain(model.named_parameters(), model.named_buffers())
    tensors = [(n, t) for n, t in everything if t.numel()]
    symbolic = any(is_fake(t) for _, t in tensors)
    if axis.size == 1 or symbolic or dist.get_backend(group) == "fake":
        return []
    digests = torch.stack([torch.hash_tensor(t.detach()).view(torch.int64) for _, t in tensors])
    everyone = comm.all_gather(digests.to(device_type)[None], axis)
    differ = (everyone != everyone[0]).any(0).nonzero().flatten().tolist()
    for i in differ:
        tensor = tensors[i][1].detach()
        buffer = tensor.to(device_type).contiguous()
        dist.broadcast(buffer, group=group, group_src=0)
        tensor.copy_(buffer)
    return [tensors[i][0] for i in differ]


def shard_parameters(model: nn.Module, plan: Plan, state: ParallelState) -> None:
    """Turn every parameter into a DTensor."""
    placed = placements(model, plan)
    device = torch.device(state.mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.accelerator.current_device_index())
    made: dict[int, nn.Parameter] = {}
    travelling = {id(p) for p in spread_experts(model, state)}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None:
                continue
            if id(p) not in made:
                made[id(p)] = shard_parameter(
                    p, placed[id(p)][1], state, device, spread=id(p) in travelling
                )
            module._parameters[name] = made[id(p)]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != device.type:
                module._buffers[name] = buffer.to(device)


def spread_experts(model: nn.Module, state: ParallelState) -> list[nn.Parameter]:
    """Parameters of experts that are split over data parallel ranks too: FSDP leaves them alone."""
    if not state.spread:
        return []
    paths = [block.experts.path for block in state.plan.blocks if block.experts is not None]
    return [p for path in paths for p in model.get_submodule(path).parameters(recurse=False)]


def shard_parameter(
    p: nn.Parameter,
    placement: Placement,
    state: ParallelState,
    device: torch.device,
    *,
    spread: bool = False,
) -> nn.Parameter:
    """This rank's part of a full parameter, as a DTensor parameter; ``spread`` over all ranks."""
    axis, mesh = (state.everyone, state.whole) if spread else (state.axis, state.mesh)
    piece = take_shard(p.detach(), placement, axis.size, axis.rank, device)
    stride = p.stride() if p.is_contiguous() else None
    tensor = as_dtensor(piece, mesh, (placement,) * mesh.ndim, p.shape, stride)
    new = nn.Parameter(tensor, requires_grad=p.requires_grad)
    # Marks that transformers leaves on parameters (already initialised, no weight decay).
    new.__dict__.update(p.__dict__)
    return new
