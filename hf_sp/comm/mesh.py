"""The mesh: taken from the user or built over the launcher's ranks.

One axis named ``tp``; with data parallel ranks, ``dp_shard`` before it, and ``dp_replicate`` before
that (accelerate's names and order). FSDP shards over context parallel ranks too, which are between:
the axis is ``dp_shard_cp`` then. Starts ``torch.distributed`` where nobody has, and the watch over
its ranks. Holds the meshes that it has built.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_sp.comm.collectives import Axis
from hf_sp.comm.degrees import AXES, WITH_CP, Degrees, ranks_of_node, sizes_of
from hf_sp.comm.watch import watch
from hf_sp.gloo import finish_at_exit
from hf_sp.torch_private import flatten, real_tensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of one model.

    Args:
        tp: 1-D, axis ``tp``.
        data: the axes that FSDP reduces over, in its order (replicate, shard); None without them.
        whole: all of them; ``tp`` without others.
        everyone: all ranks as one axis, in the order of ``whole``.
        cp: the context parallel ranks; None without them.
        inner: with a ring, those of them that are one place of it.
        outer: and those that have this rank's place in the other places.
        peers: names of the process groups over which this rank meets the ranks of other groups
            that have its place in theirs, the inner one (of dp_shard) first.
    """

    tp: DeviceMesh
    data: DeviceMesh | None
    whole: DeviceMesh
    everyone: Axis
    cp: Axis | None = None
    inner: Axis | None = None
    outer: Axis | None = None
    peers: tuple[str, ...] = ()


def build_mesh(degrees: Degrees, mesh: DeviceMesh | None) -> Mesh:
    """The ranks as a mesh; starts torch.distributed from the launcher's environment."""
    finish_at_exit()
    if mesh is None:
        start_distributed()
        # FSDP's replicated form shards too, be it over one rank.
        shard = degrees.dp_shard * degrees.cp
        first = 0 if degrees.dp_replicate > 1 else 1 if shard > 1 else 2
        shape = (degrees.dp_replicate, shard, degrees.tp)[first:]
        axes = (AXES[0], WITH_CP if degrees.cp > 1 else AXES[1], AXES[2])
        device = "cuda" if "nccl" in dist.get_backend_config() and _use_cuda() else "cpu"
        mesh = _mesh_over_all(device, shape, axes[first:])
    watch()
    _warn_of_nodes(degrees.tp)
    names = [n for n in sizes_of(mesh) if n in (*AXES[:2], WITH_CP)]
    tp = mesh["tp"] if mesh.ndim > 1 else mesh
    if degrees.fsdp == 1:
        return Mesh(tp, None, tp, Axis.of(tp))
    group = dist.group.WORLD
    assert group is not None
    everyone = Axis(group.group_name, dist.get_world_size(), dist.get_rank())
    data = mesh[tuple(names)] if len(names) > 1 else mesh[names[0]]
    # FSDP's parameters are on these axes: axes of size 1 that the user's mesh has beside are not.
    whole = mesh if mesh.ndim == len(names) + 1 else mesh[(*names, "tp")]
    cp, inner, outer = None, None, None
    peers = [mesh.get_group(n) for n in names[::-1] if sizes_of(mesh)[n] > 1]
    if degrees.cp > 1:
        shape = (degrees.dp_replicate, degrees.dp_shard, degrees.cp, degrees.tp)
        cp = _axis_of(shape, 2)
        peers = [_group_of(shape, dim) for dim in (1, 0) if shape[dim] > 1]
        if degrees.ring > 1:
            place = degrees.ring, degrees.cp // degrees.ring
            inner, outer = (_axis_of((*shape[:2], *place, shape[3]), dim) for dim in (3, 2))
    of_peers = tuple(group.group_name for group in peers)
    return Mesh(tp, data, whole, everyone, cp, inner, outer, of_peers)


def _axis_of(shape: tuple[int, ...], dim: int) -> Axis:
    """This rank's axis along a dim of all ranks, laid out in a shape."""
    group = _group_of(shape, dim)
    return Axis(
        group.group_name, shape[dim], dist.get_rank() // math.prod(shape[dim + 1 :]) % shape[dim]
    )


def _group_of(shape: tuple[int, ...], dim: int) -> dist.ProcessGroup:
    """This rank's process group along that dim; the same one for every model of this world."""
    world, key = dist.group.WORLD, (shape, dim)
    assert world is not None
    known = _groups.get(key)
    if known is None or known[0]() is not world:
        size, after = shape[dim], math.prod(shape[dim + 1 :])
        ranks = [
            [block + inner + i * after for i in range(size)]
            for block in range(0, math.prod(shape), size * after)
            for inner in range(after)
        ]
        if len(ranks) == 1:
            return world
        with real_tensors():
            group, _ = dist.new_subgroups_by_enumeration(ranks)
        known = _groups[key] = weakref.ref(world), group
    return known[1]


_groups: dict[tuple, tuple[Callable[[], Any], dist.ProcessGroup]] = {}


def _mesh_over_all(device: str, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """The mesh of that shape; the same one for every model of this world.

    Each new mesh makes process groups, which live as long as the world: with gloo their threads
    wake a hundred times a second.
    """
    world, key = dist.group.WORLD, (device, shape, names)
    known = _meshes.get(key)
    if known is None or known[0]() is not world:
        # Estimates build the model, and so the mesh, under FakeTensorMode.
        with real_tensors():
            mesh = init_device_mesh(device, shape, mesh_dim_names=names)
            flatten(mesh)
        known = _meshes[key] = weakref.ref(world), mesh
    return known[1]


_meshes: dict[tuple, tuple[Callable[[], Any], DeviceMesh]] = {}


def _warn_of_nodes(tp: int) -> None:
    """Say so, once, if the ranks of a tp group are on several nodes."""
    local = ranks_of_node()
    if local and local < dist.get_world_size() and local % tp and dist.get_rank() == 0:
        logger.warning(
            "tp=%d puts a tensor-parallel group on several nodes of %d ranks: its collectives, 10 "
            "a layer and step, go over the network. Take a tp that divides %d, and data parallel "
            "groups over the nodes (dp_shard=%d).",
            tp,
            local,
            local,
            dist.get_world_size() // local,
        )


def _use_cuda() -> bool:
    forced_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not forced_cpu


def start_distributed() -> None:
    """Start torch.distributed from the launcher's environment, or as a world of one."""
    finish_at_exit()
    if dist.is_initialized():
        return
    backend = "nccl" if _use_cuda() else "gloo"
    if _use_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:
        # A world of one, started without a launcher.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    # torch warns of process groups that are left.
    atexit.register(_stop)


def _stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
