"""accelerate and a parallelized model: same batch on all tp ranks, no wrapper, no duplicates.

The patches act where accelerate's state carries our mark (``accelerate_mesh``), or on arguments
that are parallelized models. Versions named here: accelerate 1.12 to 1.15.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.parallelism_config import ParallelismConfig
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    recursively_apply,
    synchronize_rng_states,
)
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from hf_sp.checkpoint.gather import gather_state_dict
from hf_sp.errors import ConfigError
from hf_sp.integrations.accelerate_mesh import adopt, check_holder, check_optimizer, current_is_ours
from hf_sp.model.compile import compile_layers
from hf_sp.model.lazy import LazyLogits
from hf_sp.patching import Patch, Patches
from hf_sp.state import ParallelState, parallel_state

PATCHES = Patches(lambda _: True)
"""Patches that look at their arguments."""

STATE_PATCHES = Patches(lambda _: current_is_ours())
"""Patches that act while accelerate's state carries our mark."""


@PATCHES.on(ParallelismConfig, "_validate_accelerator")
def allow_cpu_processes(original: Patch, self: ParallelismConfig, accelerator: Accelerator) -> None:
    """Accelerate 1.12 to 1.15 refuses every ParallelismConfig on several CPU processes.

    One that makes all of them tensor parallel is let through: ours, or one that may become ours.
    """
    cpu = accelerator.distributed_type == DistributedType.MULTI_CPU
    if not (cpu and self.tp_size == self.total_size == accelerator.num_processes):
        original(self, accelerator)


def _states(objects: Iterable[Any]) -> list[ParallelState]:
    return [state for thing in objects if (state := parallel_state(thing)) is not None]


@PATCHES.on(Accelerator, "prepare")
def attach_mesh_before_prepare(
    original: Patch, self: Accelerator, *args: Any, **kwargs: Any
) -> Any:
    """``Accelerator()`` knows nothing of the model: it would cut the batches over the tp ranks.

    On several GPUs it would then raise (DTensor under DDP), on CPU wrap and train wrongly.
    """
    states = _states(args)
    for state in states:
        adopt(self, state, "Accelerator.prepare")
    if states:
        prepared = [m for m in (*args, *self._models) if isinstance(m, nn.Module)]
        optimizers = [o for o in args if isinstance(o, torch.optim.Optimizer)]
        check_optimizer(optimizers, prepared, "Accelerator.prepare")
    for thing in args:
        check_holder(thing, "Accelerator.prepare")
    return original(self, *args, **kwargs)


@PATCHES.on(Accelerator, "prepare_model")
def attach_mesh_before_prepare_model(
    original: Patch, self: Accelerator, model: nn.Module, *args: Any, **kwargs: Any
) -> Any:
    """As ``prepare``, for those who call this directly; and ``torch_compile`` by layers.

    accelerate compiles the model as a whole, whose hooks and loss talk to the host.
    """
    state, plugin = parallel_state(model), self.state.dynamo_plugin
    if state is not None:
        adopt(self, state, "Accelerator.prepare_model")
    if state is None or plugin.backend == DynamoBackend.NO:
        return original(self, model, *args, **kwargs)
    backend, plugin.backend = plugin.backend, DynamoBackend.NO
    try:
        prepared = original(self, model, *args, **kwargs)
    finally:
        plugin.backend = backend
    compile_layers(model, **plugin.to_kwargs())
    return prepared


@PATCHES.on(Accelerator, "_prepare_tp")
def skip_param_remap(original: Patch, self: Accelerator, *args: Any) -> Any:
    """Do not map the optimizer's parameters anew by their address.

    accelerate 1.12 to 1.15 finds each by its local data pointer, which is 0 for all empty shards (a
    vocabulary smaller than tp): the optimizer would be given one parameter several times.
    """
    return list(args) if _states(args) else original(self, *args)


def _as_float(x: torch.Tensor) -> torch.Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return x
    if not isinstance(x, LazyLogits):
        return x.float()
    like = torch.empty(0, dtype=torch.float32, device=x.device)
    return LazyLogits(tuple(x.shape), like, lambda: x.materialize().float(), x.source, x.request)


@PATCHES.on(ConvertOutputsToFp32, "__call__")
def keep_logits_lazy(original: Patch, self: ConvertOutputsToFp32, *args: Any, **kwargs: Any) -> Any:
    """Mixed precision casts a forward's outputs before the model's hooks see them.

    The cast would make the logits of the whole vocabulary in every training step.
    """
    return recursively_apply(_as_float, self.model_forward(*args, **kwargs))


@STATE_PATCHES.on(Accelerator, "prepare_data_loader")
def sync_sampler_rng(
    original: Patch, self: Accelerator, data_loader: DataLoader, *args: Any, **kwargs: Any
) -> Any:
    """Two ways to unequal batches that accelerate leaves open on tp ranks.

    With the mesh, accelerate counts one process and so no longer synchronizes the sampler's random
    state: ranks whose CPU generators differ shuffle differently. And ``split_batches`` with a
    dispatched loader still cuts the batch over the ranks (it only logs a warning).
    """
    dispatches = self.dispatch_batches
    if dispatches is None:
        dispatches = isinstance(data_loader.dataset, IterableDataset)
    if self.split_batches and dispatches:
        raise ConfigError(
            "split_batches cannot be used with a dispatched data loader",
            where="DataLoaderConfiguration / accelerator_config",
            got="split_batches=True, with dispatch_batches=True or an IterableDataset",
            rule="accelerate would give each tp rank a part of the batch; each needs the whole",
            legal="split_batches=False, or dispatch_batches=False",
        )
    synchronize_rng_states(["torch"])
    prepared = original(self, data_loader, *args, **kwargs)
    if type(prepared) is DataLoaderShard:
        prepared.rng_types = ["torch"]
    return prepared


@STATE_PATCHES.on(DataLoaderDispatcher, "__len__")
def count_every_batch(original: Patch, self: DataLoaderDispatcher) -> int:
    """Accelerate 1.12 to 1.15 divides by the number of processes though each batch goes to all."""
    return len(self.base_dataloader)


@STATE_PATCHES.on(Accelerator, "gather_for_metrics")
def skip_gather_for_metrics(
    original: Patch, self: Accelerator, input_data: Any, use_gather_object: bool = False
) -> Any:
    """Every tp rank already has all rows; gathering would repeat each one tp times.

    transformers and accelerate drop repeated rows from the last batch only. What is left to do is
    what they do in one process: cut what was repeated to fill the last batch.
    """
    state = self.gradient_state
    if not state.end_of_dataloader or state.remainder < 1:
        return input_data
    remainder = state.remainder
    if isinstance(state.active_dataloader, DataLoaderDispatcher):
        # It counts the rows it sends to all ranks together.
        remainder //= self.num_processes
    if not use_gather_object:
        # A number (TRL's counts of tokens) has no rows.
        with contextlib.suppress(TypeError):
            return recursively_apply(
                lambda t: t[:remainder] if t.dim() else t, input_data, error_on_other_type=True
            )
    return input_data[:remainder]


@PATCHES.on(Accelerator, "get_state_dict")
def gather_whole_state_dict(
    original: Patch, self: Accelerator, model: nn.Module, unwrap: bool = True
) -> dict[str, Any]:
    """Accelerate returns the shards here; as for FSDP, give the main process the whole tensors."""
    if parallel_state(model) is None:
        return original(self, model, unwrap=unwrap)
    whole = gather_state_dict(self.unwrap_model(model), keep=self.is_main_process)
    # The class by which accelerate knows that tied weights have to be written once.
    return OrderedDict(whole)


@STATE_PATCHES.on(AcceleratedScheduler, "step")
def step_scheduler_once(
    original: Patch, self: AcceleratedScheduler, *args: Any, **kwargs: Any
) -> Any:
    """Accelerate steps the schedule once per process, counting tp ranks as data parallel."""
    split, self.split_batches = self.split_batches, True
    try:
        return original(self, *args, **kwargs)
    finally:
        self.split_batches = split
