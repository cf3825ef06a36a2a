"""Full parameters to DTensors, and HF modules to parallel ones, in place.

Owns the placement of every parameter. Modules keep their identity, name and hooks; parameters keep
their names and stay tied. Nothing here communicates but ``agree_on_weights``.
"""

from __future__ import annotations

import itertools
import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from hf_sp.comm import collectives as comm
from hf_sp.comm.collectives import Axis
from hf_sp.comm.shard import as_dtensor, take_shard
from hf_sp.errors import PlanError
from hf_sp.plan.schema import Plan
from hf_sp.state import ParallelState
from hf_sp.torch_packed import packed_shard
from hf_sp.torch_private import is_fake, process_group

logger = logging.getLogger(__name__)


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
            elif leaf.style == "packed":
                parts = packed_shard(0, leaf.segments)
                wanted[f"{leaf.path}.weight"] = wanted[f"{leaf.path}.bias"] = parts
            elif leaf.style == "row":
                wanted[f"{leaf.path}.weight"] = Shard(1)
        wanted |= {f"{path}.weight": Shard(0) for path in block.over_heads}
        wanted |= dict.fromkeys(block.of_heads, Shard(0))
        experts = block.experts
        if experts is not None:
            for name, (dim, halves) in experts.split_dims().items():
                wanted[f"{experts.path}.{name}"] = packed_shard(dim) if halves else Shard(dim)
    for path in filter(None, (plan.embedding, *plan.embeddings, plan.head)):
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
    """Make every rank's whole parameters and buffers those of the first rank, as DDP does.

    Ranks that built the model from different seeds would each shard another model. Digests are
    compared first, so that equal weights (the usual case) cost one small all-gather.

    Returns:
        Names of the tensors that differed and were taken from the first rank.
    """
    everything = itertools.chain(model.named_parameters(), model.named_buffers())
    tensors = [(n, t) for n, t in everything if t.numel() and not isinstance(t, DTensor)]
    differ = differing([t for _, t in tensors], axis, device_type)
    for i in differ:
        tensor = tensors[i][1].detach()
        buffer = tensor.to(device_type).contiguous()
        dist.broadcast(buffer, group=process_group(axis.group), group_src=0)
        tensor.copy_(buffer)
    return [tensors[i][0] for i in differ]


def report_taken(names: list[str], state: ParallelState) -> None:
    """Warn, on the first rank, of what ``agree_on_weights`` has taken from it."""
    if names and state.everyone.rank == 0:
        logger.warning(
            "%d tensors differed between the ranks; all ranks now have those of rank 0: %s%s",
            len(names),
            ", ".join(names[:3]),
            ", ..." if len(names) > 3 else "",
        )


def differing(tensors: list[Tensor], axis: Axis, device_type: str) -> list[int]:
    """Which of these tensors, one list on every rank, are not equal on all ranks of an axis.

    Digests are computed where the collectives run: a GPU reads a model faster than a core does, and
    holds one tensor of it at a time.

    Collectives: 1 all-gather of a number for each.
    """
    symbolic = any(is_fake(t) for t in tensors)
    fake = axis.size > 1 and dist.get_backend(process_group(axis.group)) == "fake"
    if axis.size == 1 or symbolic or fake or not tensors:
        return []
    digests = [torch.hash_tensor(t.detach().to(device_type)).view(torch.int64) for t in tensors]
    everyone = comm.all_gather(torch.stack(digests)[None], axis)
    return (everyone != everyone[0]).any(0).nonzero().flatten().tolist()


def home_of(state: ParallelState) -> torch.device:
    """Where this rank's shards wait."""
    return torch.device("cpu") if state.offloaded else device_of(state)


def device_of(state: ParallelState) -> torch.device:
    """Where this rank computes."""
    device = torch.device(state.mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.accelerator.current_device_index())
    return device


def shard_parameters(model: nn.Module, plan: Plan, state: ParallelState) -> None:
    """Turn every parameter into a DTensor."""
    placed, device = placements(model, plan), device_of(state)
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
            if buffer is not None and buffer.device.type not in (device.type, "meta"):
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
    """This rank's part of a full parameter, as a DTensor parameter; ``spread`` over all ranks.

    One on meta stays there, to be given its values as a shard.
    """
    axis, mesh = (state.everyone, state.whole) if spread else (state.axis, state.mesh)
    device = p.device if p.is_meta else device
    piece = take_shard(p.detach(), placement, axis.size, axis.rank, device)
    stride = p.stride() if p.is_contiguous() else None
    tensor = as_dtensor(piece, mesh, (placement,) * mesh.ndim, p.shape, stride)
    new = nn.Parameter(tensor, requires_grad=p.requires_grad)
    # Marks that transformers leaves on parameters (already initialised, no weight decay).
    new.__dict__.update(p.__dict__)
    return new
