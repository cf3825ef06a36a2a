"""accelerate and a parallelized model: the same batch on all tp ranks, no wrapper.

The patches act while accelerate is shown the groups of a model (``processes``), or on arguments
that are parallelized models. Versions named here: accelerate 1.12 to 1.15.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    recursively_apply,
    synchronize_rng_states,
)
from accelerate.utils.operations import ConvertOutputsToFp32
from torch import nn
from torch.utils.data import DataLoader

from hf_sp.checkpoint.gather import gather_state_dict
from hf_sp.integrations.processes import adopt, check_holder, check_optimizer, shown
from hf_sp.model.compile import compile_layers
from hf_sp.model.lazy import LazyLogits
from hf_sp.patching import Patch, Patches
from hf_sp.state import ParallelState, parallel_state

PATCHES = Patches(lambda _: True)
"""Patches that look at their arguments."""

STATE_PATCHES = Patches(lambda _: shown() is not None)
"""Patches that act while accelerate is shown the groups of a model."""


@PATCHES.on(ParallelismConfig, "_validate_accelerator")
def allow_cpu_processes(original: Patch, self: ParallelismConfig, accelerator: Accelerator) -> None:
    """Accelerate 1.12 to 1.15 refuses every ParallelismConfig on several CPU processes.

    One that may become ours is let through.
    """
    cpu = accelerator.distributed_type == DistributedType.MULTI_CPU
    ours = self.cp_size == self.sp_size == 1 and self.total_size == accelerator.num_processes
    if not (cpu and ours):
        original(self, accelerator)


def _states(objects: Iterable[Any]) -> list[ParallelState]:
    return [state for thing in objects if (state := parallel_state(thing)) is not None]


@PATCHES.on(Accelerator, "prepare")
def show_groups_before_prepare(
    original: Patch, self: Accelerator, *args: Any, **kwargs: Any
) -> Any:
    """``Accelerator()`` knows nothing of the model: it would cut the batches over the tp ranks."""
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
def prepare_without_wrapper(
    original: Patch,
    self: Accelerator,
    model: nn.Module,
    device_placement: bool | None = None,
    evaluation_mode: bool = False,
) -> Any:
    """As ``prepare``, for those who call this directly; no DDP; and ``torch_compile`` by layers.

    accelerate compiles the model as a whole, whose hooks and loss talk to the host.
    """
    state, plugin = parallel_state(model), self.state.dynamo_plugin
    if state is None:
        return original(self, model, device_placement, evaluation_mode)
    adopt(self, state, "Accelerator.prepare_model")
    backend, plugin.backend = plugin.backend, DynamoBackend.NO
    if state.offloaded:
        device_placement = False
    try:
        # For evaluation a model is not wrapped, and otherwise prepared in the same way.
        prepared = original(self, model, device_placement, evaluation_mode=True)
    finally:
        plugin.backend = backend
    if backend != DynamoBackend.NO:
        compile_layers(model, **plugin.to_kwargs())
    return prepared


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
    """Ranks whose CPU generators differ would shuffle, and collate, differently.

    accelerate synchronizes a sampler's generator, and that in several processes only.
    """
    synchronize_rng_states(["torch"])
    prepared = original(self, data_loader, *args, **kwargs)
    if type(prepared) is DataLoaderShard:
        prepared.rng_types = sorted({"torch", *(prepared.rng_types or ())})
    return prepared


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
