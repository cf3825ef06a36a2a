"""The mesh: taken from the user or built over the launcher's ranks.

One axis named ``tp``; with data parallel ranks, ``dp_shard`` before it, and ``dp_replicate`` before
that (accelerate's names and order). Starts ``torch.distributed`` where nobody has, and the watch
over its ranks. Holds the meshes that it has built.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_sp.comm.collectives import Axis
from hf_sp.comm.watch import watch
from hf_sp.errors import ConfigError
from hf_sp.gloo import finish_at_exit
from hf_sp.torch_private import flatten, real_tensors

logger = logging.getLogger(__name__)

AXES = ("dp_replicate", "dp_shard", "tp")
_ACCELERATES = "PARALLELISM_CONFIG_{}_SIZE"


@dataclass(frozen=True, slots=True)
class Degrees:
    """How many ranks of each kind; their product is the number of ranks.

    Args:
        tp: tensor parallel.
        dp_shard: data parallel, each with a part of the weights (FSDP).
        dp_replicate: data parallel, each with the same weights.
    """

    tp: int
    dp_shard: int = 1
    dp_replicate: int = 1

    @property
    def data(self) -> int:
        """Groups of tp ranks with a batch of their own."""
        return self.dp_shard * self.dp_replicate

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in AXES}
        return ", ".join(f"{n}={size}" for n, size in sizes.items() if size > 1 or n == "tp")


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks of one model.

    Args:
        tp: 1-D, axis ``tp``.
        data: the data parallel axes, in FSDP's order (replicate, shard); None without them.
        whole: all of them; ``tp`` without data parallel ranks.
        everyone: all ranks as one axis, in the order of ``whole``.
    """

    tp: DeviceMesh
    data: DeviceMesh | None
    whole: DeviceMesh
    everyone: Axis


def launched_world() -> int:
    """Number of ranks: of the running process group, else what the launcher announces."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_degrees(
    tp: int | None, dp_shard: int | None, dp_replicate: int, mesh: DeviceMesh | None
) -> Degrees:
    """The degrees: arguments, mesh, accelerate's environment; tp takes the ranks that are left.

    ``dp_replicate=1`` says nothing where a mesh or accelerate's configuration is given.

    Raises:
        ConfigError: they do not make up the world, or contradict the mesh or accelerate.
    """
    if mesh is not None:
        return _degrees_of(mesh, {"tp": tp, "dp_shard": dp_shard}, dp_replicate)
    world = launched_world()
    tp = _configured("tp", tp)
    dp_shard = _configured("dp_shard", dp_shard)
    dp_replicate = _configured("dp_replicate", dp_replicate if dp_replicate > 1 else None) or 1
    data = (dp_shard or 1) * dp_replicate
    if world % data or (tp is not None and tp * data != world):
        given = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "tp": tp}
        asked = [f"{n}={size}" for n, size in given.items() if size and size > 1] or [f"tp={tp}"]
        ranks = (tp or 1) * data
        raise ConfigError(
            f"{', '.join(asked)} {'do' if len(asked) > 1 else 'does'} not make up the world",
            got=f"{world} rank{'s' if world > 1 else ''}",
            rule="tp * dp_shard * dp_replicate is the number of ranks",
            legal=_fitting(world, tp, data, dp_replicate),
            remedy=f"start {ranks} ranks: torchrun --nproc_per_node {ranks} script.py",
        )
    return Degrees(tp or world // data, dp_shard or 1, dp_replicate)


def _configured(name: str, given: int | None) -> int | None:
    """A degree as it was given, else as accelerate's configuration has it."""
    variable = _ACCELERATES.format(name.upper())
    announced = os.environ.get(variable, "")
    configured = int(announced) if announced.isdigit() and int(announced) > 0 else None
    if given is not None and configured not in (None, 1, given):
        raise ConfigError(
            f"{name} contradicts accelerate's configuration",
            got=f"{name}={given}, {variable}={configured}",
            rule=f"they must be equal; {name} may be left out under accelerate launch",
        )
    return given or configured


def _fitting(world: int, tp: int | None, data: int, dp_replicate: int) -> str:
    """What may be asked for instead, one degree being changed."""
    rest = (tp or 1) * dp_replicate
    ways = [f"tp={world // data}"] if world % data == 0 else []
    if world % rest == 0 and (tp is None or world > rest):
        sizes = [d for d in range(1, world // rest + 1) if world // rest % d == 0]
        sizes = sizes if tp is None else sizes[-1:]
        ways.append("dp_shard=" + ", ".join(map(str, sizes)))
    if not ways:
        ways.append("dp_shard and dp_replicate whose product divides the number of ranks")
    return ", or ".join(ways)


def _sizes(mesh: DeviceMesh) -> dict[str, int]:
    return {name: mesh.size(i) for i, name in enumerate(mesh.mesh_dim_names or ())}


def _degrees_of(mesh: DeviceMesh, given: dict[str, int | None], dp_replicate: int) -> Degrees:
    _check_axes(mesh)
    sizes = {name: size for name, size in _sizes(mesh).items() if name in AXES}
    given = {**given, "dp_replicate": dp_replicate if dp_replicate > 1 else None}
    for name, size in given.items():
        found = sizes.get(name, 1)
        if size not in (None, found):
            raise ConfigError(
                f"{name} contradicts the mesh",
                got=f"{name}={size}, mesh axis {name!r} of size {found}",
                rule="they must be equal; degrees may be left out where a mesh is given",
            )
    return Degrees(**sizes)


def _check_axes(mesh: DeviceMesh) -> None:
    sizes = _sizes(mesh)
    got = ", ".join(f"{n}={size}" for n, size in sizes.items())
    refuse = functools.partial(ConfigError, where="parallelize(mesh=...)", got=got)
    if "tp" not in sizes:
        raise refuse(
            "the mesh has no axis named 'tp'",
            rule="the tensor parallel axis is named 'tp'",
            remedy="init_device_mesh(device, (tp,), mesh_dim_names=('tp',))",
        )
    used = [name for name, size in sizes.items() if size > 1]
    known = [name for name in sizes if name in AXES]
    spread = used not in ([], ["tp"])
    if set(used) - set(AXES) or (spread and known != sorted(known, key=AXES.index)):
        raise refuse(
            "the mesh has other axes beside tp, or in another order",
            rule="hf_sp knows dp_replicate, dp_shard and tp, in this order",
            legal=", ".join(AXES),
            remedy="pass the 1-D submesh mesh['tp'] and reduce gradients over the rest yourself",
        )
    if spread and "dp_shard" not in sizes:
        raise refuse(
            "the mesh has dp_replicate without dp_shard",
            rule="FSDP, which keeps replicas equal, asks for an axis to shard over too",
            remedy="give it one of size 1: init_device_mesh(device, (dp_replicate, 1, tp), "
            "mesh_dim_names=('dp_replicate', 'dp_shard', 'tp'))",
        )
    if spread and (ranks := mesh.mesh.flatten().tolist()) != list(range(launched_world())):
        raise refuse(
            "the mesh does not have all ranks in their order",
            got=f"ranks {ranks} of {launched_world()}",
            rule="with data parallel axes a mesh has ranks 0, 1, ... as init_device_mesh has them",
            remedy="init_device_mesh(device, (dp_shard, tp), mesh_dim_names=('dp_shard', 'tp'))",
        )


def spans_world(mesh: DeviceMesh) -> bool:
    """Whether a mesh of the user's has data parallel axes and all ranks."""
    data = [name for name, size in _sizes(mesh).items() if name in AXES[:2] and size > 1]
    return bool(data) and mesh.size() == launched_world()


def build_mesh(degrees: Degrees, mesh: DeviceMesh | None) -> Mesh:
    """The ranks as a mesh; starts torch.distributed from the launcher's environment."""
    finish_at_exit()
    if mesh is None:
        start_distributed()
        # FSDP's replicated form shards too, be it over one rank.
        first = 0 if degrees.dp_replicate > 1 else 1 if degrees.dp_shard > 1 else 2
        shape = (degrees.dp_replicate, degrees.dp_shard, degrees.tp)[first:]
        device = "cuda" if "nccl" in dist.get_backend_config() and _use_cuda() else "cpu"
        mesh = _mesh_over_all(device, shape, AXES[first:])
    watch()
    _warn_of_nodes(degrees.tp)
    names = [n for n in _sizes(mesh) if n in AXES[:2]]
    tp = mesh["tp"] if mesh.ndim > 1 else mesh
    if degrees.data == 1:
        return Mesh(tp, None, tp, Axis.of(tp))
    group = dist.group.WORLD
    assert group is not None
    everyone = Axis(group.group_name, dist.get_world_size(), dist.get_rank())
    data = mesh[tuple(names)] if len(names) > 1 else mesh[names[0]]
    # FSDP's parameters are on these axes: axes of size 1 that the user's mesh has beside are not.
    whole = mesh if mesh.ndim == len(names) + 1 else mesh[(*names, "tp")]
    return Mesh(tp, data, whole, everyone)


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
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
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
