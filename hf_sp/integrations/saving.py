"""``PreTrainedModel``'s own methods on a parallelized model: what is saved, what is refused.

``save_pretrained`` is called on all ranks and written by the first, which runs transformers' code
on stand-ins; a file's tensors are gathered when that file is written.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, modeling_utils

from hf_sp.checkpoint.gather import Gatherer, Later
from hf_sp.checkpoint.ranks import Together, meet, ranks_of
from hf_sp.errors import ConfigError
from hf_sp.patching import Patch, Patches
from hf_sp.state import parallel_state

PATCHES = Patches(lambda model: parallel_state(model) is not None)

FILE_PATCHES = Patches(lambda tensors: any(isinstance(x, Later) for x in tensors.values()))
"""Patches of what is given tensors by name."""


@PATCHES.on(PreTrainedModel, "save_pretrained")
def save_whole_tensors(
    original: Patch,
    self: PreTrainedModel,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Transformers gathers the whole model first, on every rank, and writes then."""
    if kwargs.get("distributed_checkpoint"):
        raise ConfigError(
            "save_pretrained(distributed_checkpoint=True) is not for a parallelized model",
            rule="transformers writes it for its own FSDP2 models only",
            remedy="leave it out: a plain checkpoint is written, one tensor gathered at a time",
        )
    ranks = ranks_of(self)
    meet(ranks.group, "save_pretrained")
    writes = ranks.first and self.should_save_on_this_rank(is_main_process)
    with (
        Together(ranks, "the model could not be saved", save_directory),
        Gatherer(self, state_dict) as gatherer,
    ):
        if not writes:
            return None
        if Path(save_directory).is_file():
            raise FileExistsError(f"{save_directory} is a file")
        values = {
            name: Later.of(value, partial(gatherer, name)) if isinstance(value, DTensor) else value
            for name, value in gatherer.values.items()
        }
        if getattr(self, "_hf_peft_config_loaded", False):
            # Adapters loaded in place, whose names in the file are not the model's. PEFT may copy.
            names = list(values)
            marks = {name: torch.tensor(i) for i, name in enumerate(names)}
            kept = {names[int(i)] for i in self.get_adapter_state_dict(state_dict=marks).values()}
            values = {n: gatherer(n) for n in names if n in kept}
        return original(self, save_directory, state_dict=values, **kwargs)


@FILE_PATCHES.on(modeling_utils, "safe_save_file")
def make_one_file(original: Patch, tensors: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Stand-ins become tensors when their file is written, and are gone after it."""
    original(
        {n: x.made() if isinstance(x, Later) else x for n, x in tensors.items()}, *args, **kwargs
    )


@PATCHES.on(PreTrainedModel, "gather_sharded_state_dict_for_save")
def gather_nothing(
    original: Patch, self: PreTrainedModel, model: Any, state_dict: Any, *args: Any, **kwargs: Any
) -> Any:
    """Transformers 5.17 to 5.24 copies every tensor to the CPU, stand-ins too."""
    return state_dict


@PATCHES.on(PreTrainedModel, "barrier_after_gathered_checkpoint_save")
def no_barrier(original: Patch, self: PreTrainedModel, *args: Any) -> None:
    """The writing rank alone comes here; the others serve, and leave with it."""


@PATCHES.on(PreTrainedModel, "resize_token_embeddings")
def refuse_resize(original: Patch, self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Transformers 5.17 to 5.24 copies rows of whole embeddings; of shards it fails half done."""
    if not args and all(value is None for value in kwargs.values()):
        return original(self, *args, **kwargs)  # asks for the embedding only
    raise ConfigError(
        "the vocabulary of a parallelized model cannot be resized",
        where=f"{type(self).__name__}.resize_token_embeddings",
        rule="each rank holds a range of the vocabulary's rows",
        remedy="resize the embeddings before parallelize",
    )
