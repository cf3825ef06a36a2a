"""How an ``Accelerator`` is told of a parallelized model's mesh, and what it is refused.

Through a ``ParallelismConfig`` that carries the mesh itself (no second set of process groups) and
our mark. The patches in ``accelerate_patches`` act where that mark is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from torch import nn

from hf_sp.errors import ConfigError
from hf_sp.state import ATTRIBUTE, ParallelState, parallel_state

_MARK = "_hf_sp"
OTHER_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""What accelerate would put around a model, by its own names."""


def _is_ours(config: ParallelismConfig | None) -> bool:
    return bool(getattr(config, _MARK, False))


def current_is_ours() -> bool:
    """Whether accelerate's state, which all accelerators share, carries our mark."""
    return _is_ours(AcceleratorState._shared_state.get("parallelism_config"))


def check_world(state: ParallelState, where: str) -> None:
    """Refuse ranks beyond the tp group: Trainer and accelerate would give them the same batch."""
    world = dist.get_world_size()
    if world != state.tp:
        raise ConfigError(
            f"tp={state.tp} does not make up the {world} processes: data parallel is not supported",
            where=where,
            got=f"world size {world}, tp {state.tp}, {state.data} data parallel group(s)",
            rule="under transformers and accelerate all processes are tensor parallel in this "
            "release; dp_shard and dp_replicate are for training loops of one's own",
            legal=f"{state.tp} processes, or parallelize(model, tp={world})",
        )


def config_for(
    state: ParallelState, given: ParallelismConfig | None, where: str
) -> ParallelismConfig | None:
    """The ParallelismConfig of a parallelized model, with its mesh and our mark; at tp=1 none.

    Raises:
        ConfigError: the user's own says other than the model.
    """
    # All of them: absent sizes are read from the environment.
    sizes = {"tp_size": state.tp}
    sizes |= dict.fromkeys(("dp_replicate_size", "dp_shard_size", "cp_size", "sp_size"), 1)
    config = given or ParallelismConfig(**sizes)
    differing = [name for name, size in sizes.items() if getattr(config, name) != size]
    if differing:
        raise ConfigError(
            "the ParallelismConfig does not agree with the parallelized model",
            where=where,
            got=", ".join(f"{name}={getattr(config, name)}" for name in differing),
            rule="the model's degrees count; accelerate's sp_size is DeepSpeed Ulysses, not ours",
            legal=", ".join(f"{name}={sizes[name]}" for name in differing),
            remedy="leave the ParallelismConfig out: it is made from the model",
        )
    if state.tp == 1:
        return given
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
    if engine in OTHER_ENGINES:
        raise refuse_engine(engine, where)
    current = accelerator.state.parallelism_config
    if state.tp == 1 or _is_ours(current):
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


def check_holder(model: Any, where: str) -> None:
    """Refuse a module that holds a parallelized model where nobody looks for it."""
    unseen = isinstance(model, nn.Module) and parallel_state(model) is None
    inside = model.named_modules() if unseen else ()
    if (path := next((n for n, m in inside if ATTRIBUTE in m.__dict__), None)) is not None:
        raise ConfigError(
            "a parallelized model is inside of another module",
            where=f"{where}: {type(model).__name__}.{path}",
            rule="each rank would be taken for one with a batch of its own, and write its shards",
            remedy="pass the parallelized model itself; what is around it can go into compute_loss",
        )


def release() -> None:
    """Forget the mesh of an earlier model: accelerate's state outlives the accelerator."""
    if current_is_ours():
        AcceleratorState._shared_state.update(parallelism_config=None, device_mesh=None)


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
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    foreign = sum(id(p) not in known for p in held)
    if foreign:
        raise ConfigError(
            "the optimizer was not made from the parallelized model's parameters",
            where=where,
            got=f"{foreign} of its {len(held)} parameters are not the model's",
            rule="parallelize replaces the parameters; an older optimizer steps on dead ones",
            remedy="make the optimizer after parallelize(model)",
        )
