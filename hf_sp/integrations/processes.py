"""What accelerate, and with it Trainer, takes for the processes: groups of ranks, not ranks.

To them a parallelized model is a plain one in as many processes as there are groups with a batch of
their own. All that they count, deal out, gather and average is right then; what one process does
for all (files, messages) is done by the first rank, see ``process_patches``. The state that all
accelerators share is where that is said, and the mark that it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from torch import nn

from hf_sp.errors import ConfigError
from hf_sp.state import ATTRIBUTE, ParallelState, parallel_state

_MARK = "_hf_sp_state"
OTHER_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""What accelerate would put around a model, by its own names."""


def shown() -> ParallelState | None:
    """The model whose groups accelerate takes for the processes."""
    return AcceleratorState._shared_state.get(_MARK)


def _tell(processes: int, index: int) -> None:
    for shared in (PartialState._shared_state, AcceleratorState._shared_state):
        if shared:
            shared.update(num_processes=processes, process_index=index)


def group_index(state: ParallelState) -> int:
    """This rank's group among those that have a batch of their own."""
    return state.everyone.rank // state.group_size


def release() -> None:
    """Show the ranks again: accelerate's state outlives the accelerator."""
    if AcceleratorState._shared_state.pop(_MARK, None) is not None:
        _tell(dist.get_world_size(), dist.get_rank())


@contextlib.contextmanager
def as_ranks() -> Iterator[None]:
    """Show the ranks for a while."""
    shared = PartialState._shared_state
    before = shared["num_processes"], shared["process_index"]
    _tell(dist.get_world_size(), dist.get_rank())
    try:
        yield
    finally:
        _tell(*before)


def check_config(state: ParallelState, given: ParallelismConfig | None, where: str) -> None:
    """Refuse (ConfigError) a ParallelismConfig of the user's that says other than the model."""
    if given is None:
        return
    names = ("tp", "dp_shard", "dp_replicate", "cp", "sp")
    sizes = {f"{name}_size": getattr(state.degrees, name, 1) for name in names}
    differing = [name for name, size in sizes.items() if getattr(given, name) != size]
    if differing:
        raise ConfigError(
            "the ParallelismConfig does not agree with the parallelized model",
            where=where,
            got=", ".join(f"{name}={getattr(given, name)}" for name in differing),
            rule="the model's degrees count; accelerate's sp_size is DeepSpeed Ulysses, not ours",
            legal=", ".join(f"{name}={sizes[name]}" for name in differing),
            remedy="leave the ParallelismConfig out: the model's degrees are known",
        )


def adopt(accelerator: Accelerator, state: ParallelState, where: str) -> None:
    """Show an accelerator, and all others, the groups of a model.

    Raises:
        ConfigError: it runs another engine, disagrees with the model, or has already cut a data
            loader over other processes.
    """
    engine = accelerator.distributed_type.value
    if engine in OTHER_ENGINES:
        raise refuse_engine(engine, where)
    if state.everyone.size == 1:
        return
    check_config(state, accelerator.state.parallelism_config, where)
    if accelerator._dataloaders and accelerator.num_processes != state.data:
        raise ConfigError(
            "a data loader was prepared before the parallelized model",
            where=where,
            got="it gives every rank another batch",
            rule="all ranks of a tensor-parallel group are given the same batch",
            remedy="prepare them together, or the model first: accelerator.prepare(model, loader)",
        )
    # Its own mesh would cut batches and wrap the model once more.
    AcceleratorState._shared_state.update(
        {_MARK: state, "parallelism_config": None, "device_mesh": None}
    )
    _tell(state.data, group_index(state))


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
