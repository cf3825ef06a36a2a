"""The stock ``Trainer``: what it writes, and what it reads again, with a parallelized model.

Every rank enters, one writes; the optimizer's shards go where each rank finds its own.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import safe_globals

from hf_sp.checkpoint.optimizer import (
    OPTIMIZER_DIRECTORY,
    load_full_optimizer,
    load_optimizer,
    save_optimizer,
)
from hf_sp.checkpoint.weights import gather_state_dict
from hf_sp.errors import CheckpointError
from hf_sp.integrations.trainer import state_of
from hf_sp.patching import Patch, Patches
from hf_sp.state import parallel_state

logger = logging.getLogger(__name__)

PATCHES = Patches(lambda trainer: parallel_state(trainer.model) is not None)
"""Patches of Trainers that train a parallelized model: their files."""


# --- saving -------------------------------------------------------------------------------------


@PATCHES.on(Trainer, "save_model")
def save_on_all_ranks(
    original: Patch,
    self: Any,
    output_dir: str | None = None,
    _internal_call: bool = False,
) -> None:
    """Trainer 5.17 calls ``_save`` on the writing rank alone, which would gather alone."""
    if self.args.should_save:
        original(self, output_dir, _internal_call=_internal_call)
        return
    self._save(output_dir if output_dir is not None else self.args.output_dir)
    if self.args.push_to_hub and not _internal_call:
        self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


@PATCHES.on(Trainer, "_save")
def gather_on_all_ranks(
    original: Patch,
    self: Any,
    output_dir: str | None = None,
    state_dict: dict[str, Any] | None = None,
) -> None:
    """Trainer returns at once on the other ranks (5.23), or writes its own files there (5.17)."""
    target = output_dir if output_dir is not None else self.args.output_dir
    saves_itself = isinstance(self.model, PreTrainedModel) or hasattr(self.model, "peft_config")
    if not saves_itself and state_dict is None:
        state_dict = gather_state_dict(self.model, keep=self.args.should_save)
    if self.args.should_save:
        original(self, target, state_dict)
    elif saves_itself:
        self.model.save_pretrained(target, state_dict=state_dict, is_main_process=False)


@PATCHES.on(Trainer, "_save_checkpoint")
def barrier_after_checkpoint(original: Patch, self: Any, *args: Any, **kwargs: Any) -> None:
    """The first rank writes ``trainer_state.json`` last; another could resume before that."""
    original(self, *args, **kwargs)
    if state_of(self).tp > 1:
        dist.barrier(group=state_of(self).group)


@PATCHES.on(Trainer, "_save_optimizer_and_scheduler")
def save_optimizer_shards(original: Patch, self: Any, output_dir: str) -> None:
    """Trainer writes the first rank's optimizer state, and gives it to every rank on resume."""
    save_optimizer(self.model, self.optimizer, Path(output_dir) / OPTIMIZER_DIRECTORY)
    if self.args.should_save:
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)


# --- resuming -----------------------------------------------------------------------------------


@PATCHES.on(Trainer, "_load_optimizer_and_scheduler")
def load_optimizer_shards(original: Patch, self: Any, checkpoint: str | None) -> None:
    """As ``save_optimizer_shards``; also takes a one-process ``optimizer.pt``."""
    if checkpoint is None:
        return
    folder = Path(checkpoint)
    ours, stock = folder / OPTIMIZER_DIRECTORY, folder / OPTIMIZER_NAME
    if ours.is_dir():
        load_optimizer(self.model, self.optimizer, ours)
    elif stock.is_file():
        whole = torch.load(stock, map_location="cpu", weights_only=True)
        load_full_optimizer(self.model, self.optimizer, whole)
    else:
        logger.warning("No optimizer state in %s: the optimizer starts anew.", checkpoint)
        return
    if (folder / SCHEDULER_NAME).is_file():
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))


@PATCHES.on(Trainer, "_load_rng_state")
def load_rank0_rng(original: Patch, self: Any, checkpoint: str | None) -> None:
    """A checkpoint of another degree lacks some ranks' files, which Trainer passes over.

    Tensor-parallel ranks share one random state, so the first rank's serves all.
    """
    if checkpoint is None:
        return
    folder = Path(checkpoint)
    files = sorted(folder.glob("rng_state*.pth"))
    own = (
        "rng_state.pth" if self.args.world_size <= 1 else f"rng_state_{self.args.process_index}.pth"
    )
    if len(files) == self.args.world_size and (folder / own).is_file():
        original(self, checkpoint)
        return
    first = [f for f in files if f.name in ("rng_state.pth", "rng_state_0.pth")]
    if not first:
        return
    with safe_globals():
        saved = torch.load(first[0], weights_only=True)
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])
    torch.random.set_rng_state(saved["cpu"])
    if "cuda" in saved and torch.cuda.is_available():
        device_states = saved["cuda"]
        # One state of one process, or the list of all devices that it saw.
        state = device_states if isinstance(device_states, Tensor) else device_states[0]
        torch.cuda.set_rng_state(state)


@PATCHES.on(Trainer, "_issue_warnings_after_load")
def refuse_missing_weights(original: Patch, self: Any, load_result: Any) -> None:
    """Trainer logs a warning and trains on with whatever the model had."""
    ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or [])
    missing = set(load_result.missing_keys) - ignored
    owners: dict[int, set[str]] = {}
    for name, parameter in self.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    # Of tied names one is saved.
    for names in owners.values():
        if names - missing:
            missing -= names
    if missing:
        raise CheckpointError(
            "the checkpoint lacks weights of the model",
            where="resume_from_checkpoint / load_best_model_at_end",
            got=", ".join(sorted(missing)[:8]) + (" ..." if len(missing) > 8 else ""),
            rule="a resumed model has all its weights from the checkpoint",
            remedy="resume from a checkpoint of this model",
        )
    original(self, load_result)
