"""torch's own checkpoint tools (``torch.distributed.checkpoint``) and packed weights.

A rank's part of packed tensors is several rectangles of the whole; these tools know one a rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import _state_dict_utils
from torch.distributed.checkpoint import metadata, planner
from torch.distributed.tensor import DTensor, Shard

from hf_sp.comm.shard import as_dtensor, shard_like, split_local
from hf_sp.patching import Patch, Patches
from hf_sp.torch_packed import is_packed, packed_sizes


def _packed(x: Any) -> bool:
    """Whether tp has split several tensors packed in x; FSDP's strided shards are of other axes."""
    named = isinstance(x, DTensor) and x.device_mesh.mesh_dim_names
    axes = zip(named, x.placements, strict=True) if named else ()
    return any(axis == "tp" and is_packed(p) for axis, p in axes)


def _pieces(x: DTensor) -> list[tuple[metadata.ChunkStorageMetadata, Tensor]]:
    """The places of this rank's part of each packed tensor, and views of them."""
    packed = next(p for p in x.placements if is_packed(p))
    dim, before, shape = packed.dim, 0, list(x.shape)
    placed = [Shard(dim) if is_packed(p) and p.dim == dim else p for p in x.placements]
    found: list[Any] = []
    sizes = packed_sizes(packed.split_factor, x.shape[dim])
    for shape[dim], part in zip(sizes, split_local(x, packed), strict=True):
        (chunk,) = as_dtensor(part, x.device_mesh, placed, shape).__create_chunk_list__()
        starts = list(chunk.offsets)
        starts[dim] += before
        before += shape[dim]
        found.append((metadata.ChunkStorageMetadata(torch.Size(starts), chunk.sizes), part))
    return found


PATCHES = Patches(_packed)


@PATCHES.on(DTensor, "__create_write_items__")
def write_parts(original: Patch, self: DTensor, fqn: str, object: Any) -> list[planner.WriteItem]:
    """``dcp.save`` writes one rectangle a rank."""
    items = []
    for chunk, part in _pieces(self):
        properties = metadata.TensorProperties.create_from_tensor(part)
        index = metadata.MetadataIndex(fqn, chunk.offsets)
        data = planner.TensorWriteData(chunk, properties, self.size())
        items.append(planner.WriteItem(index, planner.WriteItemType.SHARD, tensor_data=data))
    return items


@PATCHES.on(DTensor, "__create_chunk_list__")
def list_parts(original: Patch, self: DTensor) -> list[metadata.ChunkStorageMetadata]:
    """``dcp.load`` reads one rectangle a rank."""
    return [chunk for chunk, _ in _pieces(self)]


@PATCHES.on(DTensor, "__get_tensor_shard__")
def part_at(original: Patch, self: DTensor, index: metadata.MetadataIndex) -> Tensor:
    """Both take the whole local tensor for that rectangle."""
    return next(part for chunk, part in _pieces(self) if chunk.offsets == index.offset)


WHOLE_PATCHES = Patches(lambda _: True)


@WHOLE_PATCHES.on(_state_dict_utils, "_distribute_tensors")
def distribute_parts(
    original: Patch, local_state_dict: dict[str, Any], keys: list[str], *args: Any, **kwargs: Any
) -> None:
    """``set_model_state_dict`` and ``set_optimizer_state_dict`` from rank 0 copy one rectangle."""
    for key in keys:
        pair = local_state_dict.get(key)
        if isinstance(pair, tuple) and _packed(pair[0]):
            like, whole = pair
            local_state_dict[key] = shard_like(whole, like)
    original(local_state_dict, keys, *args, **kwargs)
