"""How an ``Accelerator`` is told of a parallelized model's mesh, and what it is refused.

Through a ``ParallelismConfig`` that carries the mesh itself (no second set of process groups) and
our mark. The patches in ``accelerate_patches`` act where that mark is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from torch import nn

from hf_sp.errors import ConfigError
from hf_sp.state import ParallelState

_MARK = "_hf_sp"
_OTHER_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM")

models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The parallelized models of this process that are alive."""


def register_parallel_model(model: nn.Module) -> None:
    """Note that a parallelized model is alive in this process."""
    models.add(model)


def is_ours(config: ParallelismConfig | None) -> bool:
    """Whether this configuration was made for a parallelized model."""
    return bool(getattr(config, _MARK, False))


def current_is_ours() -> bool:
    """Whether accelerate's state, which all accelerators share, carries our mark."""
    shared = AcceleratorState._shared_state
    return is_ours(shared.get("parallelism_config"))


def check_world(state: ParallelState, where: str) -> None:
    """Refuse ranks beyond the tp group: Trainer and accelerate would give them the same batch."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != state.tp:
        raise ConfigError(
            f"tp={state.tp} does not make up the {world} processes: data parallel is not supported",
            where=where,
            got=f"world size {world}, tp {state.tp}, {state.data} data parallel group(s)",
            rule="under transformers and accelerate all processes are tensor parallel in this "
            "release; dp_shard and dp_replicate are for training loops of one's own",
            legal=f"{state.tp} processes, or parallelize(model, tp={world})",
        )


def check_config(config: ParallelismConfig, state: ParallelState, where: str) -> None:
    """Refuse a user's ParallelismConfig that says other than the model."""
    sizes = {
        name: getattr(config, f"{name}_size")
        for name in ("tp", "dp_replicate", "dp_shard", "cp", "sp")
    }
    wanted = {**dict.fromkeys(sizes, 1), "tp": state.tp}
    if sizes != wanted:
        differing = [n for n in sizes if sizes[n] != wanted[n]]
        raise ConfigError(
            "the ParallelismConfig does not agree with the parallelized model",
            where=where,
            got=", ".join(f"{n}_size={sizes[n]}" for n in differing),
            rule="the model's degrees count; accelerate's sp_size is DeepSpeed Ulysses, not ours",
            legal=", ".join(f"{n}_size={wanted[n]}" for n in differing),
            remedy="leave the ParallelismConfig out: it is made from the model",
        )


def config_for(
    state: ParallelState, given: ParallelismConfig | None, where: str
) -> ParallelismConfig:
    """The ParallelismConfig of a parallelized model, carrying its mesh and our mark."""
    if given is not None:
        check_config(given, state, where)
    # Explicit ones: absent sizes are read from the environment.
    config = given or ParallelismConfig(
        tp_size=state.tp, dp_replicate_size=1, dp_shard_size=1, cp_size=1, sp_size=1
    )
    config.device_mesh = state.mesh
    setattr(config, _MARK, True)
    return config


def adopt(accelerator: Accelerator, state: ParallelState, where: str) -> None:
    """Tell an accelerator that was made without knowing the model of its mesh.

    Raises:
        ConfigError: it runs another engine, disagrees with the model, or has already cut a data
            loader into different batches for each rank.
    """
    check_world(state, where)
    engine = accelerator.distributed_type.value
    if engine in _OTHER_ENGINES:
        raise refuse_engine(engine, where)
    current = accelerator.state.parallelism_config
    if state.tp == 1 or is_ours(current):
        return
    if accelerator._dataloaders and accelerator.num_processes > 1:
        raise ConfigError(
            "a data loader was prepared before the parallelized model",
            where=where,
            got="it gives every rank another batch",
            rule="all ranks of a tensor-parallel group are given the same batch",
            remedy="prepare them together, or the model first: accelerator.prepare(model, loader)",
        )
    accelerator.state.parallelism_config = config_for(state, current, where)
    accelerator.state.device_mesh = state.mesh


def release() -> None:
    """Forget the mesh of an earlier model: accelerate's state outlives the accelerator."""
    if current_is_ours():
        shared = AcceleratorState._shared_state
        shared["parallelism_config"] = None
        shared["device_mesh"] = None


def refuse_engine(engine: str, where: str) -> ConfigError:
    """The refusal of another engine on top of a parallelized model."""
    return ConfigError(
        f"{engine} cannot be applied to a parallelized model by transformers or accelerate",
        where=where,
        got=engine,
        rule="the parameters are already sharded; the engine would shard or wrap them again",
        legal="no fsdp, deepspeed or megatron_lm plugin",
        remedy="leave the plugin out (TrainingArguments fsdp/deepspeed, or the accelerate config)",
    )


def check_optimizer(
    optimizers: Iterable[torch.optim.Optimizer], models: Iterable[nn.Module], where: str
) -> None:
    """Refuse an optimizer over parameters that ``parallelize`` has replaced: it trains nothing."""
    known = {id(p) for m in models for p in m.parameters()}
    for optimizer in optimizers:
        held = [p for g in optimizer.param_groups for p in g["params"]]
        foreign = sum(id(p) not in known for p in held)
        if foreign:
            raise ConfigError(
                "the optimizer was not made from the parallelized model's parameters",
                where=where,
                got=f"{foreign} of its {len(held)} parameters are not the model's",
                rule="parallelize replaces the parameters; an older optimizer steps on dead ones",
                remedy="make the optimizer after parallelize(model)",
            )
