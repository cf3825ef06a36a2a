"""What groups of ranks that are shown as processes need: one writer, and gathers over the groups.

The patches act while accelerate is shown the groups of a model (``processes``). Versions named
here: accelerate 1.12 to 1.15, transformers 5.17 to 5.24.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, SkipBatchSampler
from accelerate.state import PartialState
from accelerate.utils import operations, recursively_apply
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_sp.integrations.processes import as_ranks, group_index, shown
from hf_sp.patching import Patch, Patches
from hf_sp.state import ParallelState
from hf_sp.torch_private import process_group

PATCHES = Patches(lambda _: shown() is not None)
"""Patches that act while groups are shown."""


def _shown() -> ParallelState:
    state = shown()
    assert state is not None
    return state


def _groups(state: ParallelState) -> list[dist.ProcessGroup]:
    """The process groups over which this rank meets the other groups' ranks, the inner one first.

    Gathered over them in turn, parts lie in the order of the groups.
    """
    return [process_group(name) for name in state.peers]


# --- who is the one that writes -----------------------------------------------------------------


@PATCHES.on(PartialState, "is_main_process")
@PATCHES.on(PartialState, "use_distributed")
@PATCHES.on(TrainingArguments, "should_save")
@PATCHES.on(TrainingArguments, "should_log")
@PATCHES.on(Trainer, "is_world_process_zero")
@PATCHES.on(Trainer, "_save_rng_state")
def ask_of_the_rank(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The first group has several ranks, of which one is the first."""
    with as_ranks():
        return original(self, *args, **kwargs)


@PATCHES.on(TrainingArguments, "main_process_first")
@contextlib.contextmanager
def first_rank_first(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """As ``ask_of_the_rank``, for as long as the block runs."""
    with as_ranks(), original(self, *args, **kwargs):
        yield


# --- gathers ------------------------------------------------------------------------------------


@PATCHES.on(operations, "_gpu_gather")
def gather_over_groups(original: Patch, tensor: Any) -> Any:
    """Accelerate gathers over all ranks: each row would come tp times."""
    groups = _groups(_shown())

    def gather(x: Tensor) -> Tensor:
        x = x.clone()[None] if x.ndim == 0 else x.contiguous()
        for group in groups:
            parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, x, group=group)
            x = torch.cat(parts)
        return x

    return recursively_apply(gather, tensor, error_on_other_type=True)


@PATCHES.on(operations, "_gpu_gather_object")
def gather_objects_over_groups(original: Patch, object: Any) -> Any:
    """As ``gather_over_groups``; and accelerate makes lists of rows of tensors.

    Trainer joins such lists row by row, and loses the rows that a shorter last one lacks.
    """
    found = [object]
    for group in _groups(_shown()):
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, found, group=group)
        found = [x for part in parts for x in part]
    if len(found) == 1:
        return object
    joined = all(isinstance(x, Tensor) and x.shape[1:] == found[0].shape[1:] for x in found)
    return torch.cat(found) if joined else [row for x in found for row in x]


@PATCHES.on(Accelerator, "reduce")
def reduce_over_groups(
    original: Patch, self: Accelerator, tensor: Any, reduction: str = "sum", scale: float = 1.0
) -> Any:
    """As ``gather_over_groups``: each group's value would count tp times."""
    state = _shown()

    def reduce(x: Tensor) -> Tensor:
        x = x.clone()
        for group in _groups(state):
            op = dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM
            dist.all_reduce(x, op, group=group)
        return x.div_(state.data) if reduction == "mean" else x

    return recursively_apply(reduce, tensor, error_on_other_type=True)


# --- dispatched batches -------------------------------------------------------------------------


@PATCHES.on(DataLoaderDispatcher, "__init__")
def dispatch_to_groups(original: Patch, self: Any, *args: Any, **kwargs: Any) -> None:
    """One rank reads for all; each takes its group's rows of what it is sent."""
    state, sampler = _shown(), kwargs.get("batch_sampler")
    if isinstance(sampler, SkipBatchSampler) and not kwargs.get("split_batches"):
        # accelerate skips one batch for those of all processes.
        skipped = sampler.skip_batches * state.data
        kwargs["batch_sampler"] = SkipBatchSampler(sampler.batch_sampler, skipped)
    original(self, *args, **kwargs)
    cut = self.slice_fn
    self.state = types.SimpleNamespace(
        process_index=state.everyone.rank, num_processes=state.data, device=PartialState().device
    )

    def own_rows(data: Any, rows: slice, **kwargs: Any) -> Any:
        # Rows from the start are wanted as they are, others for the index of this rank.
        size, index = rows.stop - rows.start, group_index(state)
        own = slice(index * size, (index + 1) * size) if rows.start else rows
        return cut(data, own, **{**kwargs, "process_index": index})

    self.slice_fn = own_rows
