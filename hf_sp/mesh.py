"""The tp mesh: taken from the user or built over the launcher's ranks.

Starts ``torch.distributed`` where nobody has. Holds nothing global.
"""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_sp.errors import ConfigError
from hf_sp.torch_private import real_tensors


def launched_world() -> int:
    """Number of ranks: of the running process group, else what the launcher announces."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_tp(tp: int | None, mesh: DeviceMesh | None) -> int:
    """The tp degree: argument, mesh, accelerate's environment, else all ranks.

    Args:
        tp: the user's argument.
        mesh: the user's mesh.

    Raises:
        ConfigError: tp does not make up the world, or contradicts the mesh or accelerate.
    """
    if mesh is not None:
        size = _tp_axis(mesh).size()
        if tp is not None and tp != size:
            raise ConfigError(
                "tp contradicts the mesh",
                got=f"tp={tp}, mesh axis 'tp' of size {size}",
                rule="they must be equal; tp may be left out where a mesh is given",
            )
        return size
    world = launched_world()
    announced = os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "")
    configured = int(announced) if announced.isdigit() and int(announced) > 0 else None
    if tp is not None and configured not in (None, 1, tp):
        raise ConfigError(
            "tp contradicts accelerate's configuration",
            got=f"tp={tp}, PARALLELISM_CONFIG_TP_SIZE={configured}",
            rule="they must be equal; tp may be left out under accelerate launch",
        )
    tp = tp or configured or world
    if tp != world:
        raise ConfigError(
            f"tp={tp} does not make up the world",
            got=f"{world} rank{'s' if world > 1 else ''}",
            rule="in this release all ranks are tensor parallel: no data parallel ranks beside tp",
            legal=f"tp={world}",
            remedy=f"start {tp} ranks: torchrun --nproc_per_node {tp} script.py",
        )
    return tp


def _tp_axis(mesh: DeviceMesh) -> DeviceMesh:
    names = mesh.mesh_dim_names or ()
    if "tp" not in names:
        raise ConfigError(
            "the mesh has no axis named 'tp'",
            where="parallelize(mesh=...)",
            got=f"axes {names}",
            rule="the tensor parallel axis is named 'tp'",
            remedy="init_device_mesh(device, (tp,), mesh_dim_names=('tp',))",
        )
    axis = mesh["tp"] if len(names) > 1 else mesh
    if axis.size() != mesh.size():
        raise ConfigError(
            "the mesh has other axes beside tp",
            where="parallelize(mesh=...)",
            got=", ".join(f"{n}={mesh.size(i)}" for i, n in enumerate(names)),
            rule="data parallel ranks beside tp are not built yet",
            remedy="pass the 1-D submesh mesh['tp'] and reduce gradients over the rest yourself",
        )
    return axis


def build_mesh(tp: int, mesh: DeviceMesh | None) -> DeviceMesh:
    """The 1-D mesh named ``tp``; starts torch.distributed from the launcher's environment."""
    if mesh is not None:
        return _tp_axis(mesh)
    start_distributed()
    # Estimates build the model, and so the mesh, under FakeTensorMode.
    with real_tensors():
        return init_device_mesh(_device_type(), (tp,), mesh_dim_names=("tp",))


def _use_cuda() -> bool:
    forced_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return torch.cuda.is_available() and not forced_cpu


def start_distributed() -> None:
    """Start torch.distributed from the launcher's environment, or as a world of one."""
    if dist.is_initialized():
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    backend = "nccl" if _use_cuda() else "gloo"
    if _use_cuda():
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:
        # A world of one, started without a launcher.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    # Whoever starts it stops it: gloo's threads, still running at interpreter exit, abort the
    # process after all work is done.
    atexit.register(_stop)


def _stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device_type() -> str:
    backend = dist.get_backend()
    if backend == "fake":
        return "cpu"
    return "cuda" if "nccl" in dist.get_backend_config() and _use_cuda() else "cpu"
