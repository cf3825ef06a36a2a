"""How many ranks of each kind: from arguments, a mesh, the launcher and accelerate's environment.

Must not know how a mesh is built.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from hf_sp.errors import ConfigError

AXES = ("dp_replicate", "dp_shard", "tp")
WITH_CP = "dp_shard_cp"
"""The axis of dp_shard where it spans context parallel ranks too (accelerate's name)."""
_ACCELERATES = "PARALLELISM_CONFIG_{}_SIZE"


@dataclass(frozen=True, slots=True)
class Degrees:
    """How many ranks of each kind; their product is the number of ranks.

    Args:
        tp: tensor parallel.
        dp_shard: data parallel, each with a part of the weights (FSDP).
        dp_replicate: data parallel, each with the same weights.
        cp: context parallel, each with a part of the sequence and of the weights (FSDP).
        ring: of cp, places of a ring, each of neighbouring ranks.
    """

    tp: int
    dp_shard: int = 1
    dp_replicate: int = 1
    cp: int = 1
    ring: int = 1

    @property
    def data(self) -> int:
        """Groups of tp and cp ranks with a batch of their own."""
        return self.dp_shard * self.dp_replicate

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP reduces gradients."""
        return self.data * self.cp

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in (*AXES, "cp")}
        return ", ".join(f"{n}={size}" for n, size in sizes.items() if size > 1 or n == "tp")


def launched_world() -> int:
    """Number of ranks: of the running process group, else what the launcher announces."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_of_node() -> int:
    """How many ranks the launcher says are on this machine; 0 if it does not say."""
    size = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(size) if size.isdigit() else 0


def resolve_degrees(
    tp: int | None,
    dp_shard: int | None,
    dp_replicate: int,
    mesh: DeviceMesh | None,
    cp: int = 1,
) -> Degrees:
    """The degrees: arguments, mesh, accelerate's environment; tp takes the ranks that are left.

    ``dp_replicate=1`` says nothing where a mesh or accelerate's configuration is given.

    Raises:
        ConfigError: they do not make up the world, or contradict the mesh or accelerate.
    """
    if mesh is not None:
        if cp > 1:
            raise ConfigError(
                "cp with a mesh of the user's",
                where="parallelize(mesh=...)",
                got=f"cp={cp}",
                rule="FSDP's axis spans the cp ranks too: hf_sp builds that mesh",
                remedy="leave mesh out: parallelize(model, tp=..., cp=..., dp_shard=...)",
            )
        return _degrees_of(mesh, {"tp": tp, "dp_shard": dp_shard}, dp_replicate)
    world = launched_world()
    tp = _configured("tp", tp)
    dp_shard = _configured("dp_shard", dp_shard)
    dp_replicate = _configured("dp_replicate", dp_replicate if dp_replicate > 1 else None) or 1
    data = (dp_shard or 1) * dp_replicate * cp
    if world % data or (tp is not None and tp * data != world):
        given = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp}
        asked = [f"{n}={size}" for n, size in given.items() if size and size > 1] or [f"tp={tp}"]
        ranks = (tp or 1) * data
        raise ConfigError(
            f"{', '.join(asked)} {'do' if len(asked) > 1 else 'does'} not make up the world",
            got=f"{world} rank{'s' if world > 1 else ''}",
            rule="tp * cp * dp_shard * dp_replicate is the number of ranks",
            legal=_fitting(world, tp, data, dp_replicate * cp),
            remedy=f"start {ranks} ranks: torchrun --nproc_per_node {ranks} script.py",
        )
    return Degrees(tp or world // data, dp_shard or 1, dp_replicate, cp)


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


def _fitting(world: int, tp: int | None, data: int, others: int) -> str:
    """What may be asked for instead, one degree being changed; ``others`` are left as they are."""
    rest = (tp or 1) * others
    ways = [f"tp={world // data}"] if world % data == 0 else []
    if world % rest == 0 and (tp is None or world > rest):
        sizes = [d for d in range(1, world // rest + 1) if world // rest % d == 0]
        sizes = sizes if tp is None else sizes[-1:]
        ways.append("dp_shard=" + ", ".join(map(str, sizes)))
    if not ways:
        ways.append("dp_shard, dp_replicate and cp whose product divides the number of ranks")
    return ", or ".join(ways)


def sizes_of(mesh: DeviceMesh) -> dict[str, int]:
    """A mesh's axes and their sizes."""
    return {name: mesh.size(i) for i, name in enumerate(mesh.mesh_dim_names or ())}


def _degrees_of(mesh: DeviceMesh, given: dict[str, int | None], dp_replicate: int) -> Degrees:
    _check_axes(mesh)
    sizes = {name: size for name, size in sizes_of(mesh).items() if name in AXES}
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
    sizes = sizes_of(mesh)
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
    data = [name for name, size in sizes_of(mesh).items() if name in AXES[:2] and size > 1]
    return bool(data) and mesh.size() == launched_world()
