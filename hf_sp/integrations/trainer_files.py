"""The stock ``Trainer``: what it writes, and what it reads again, with a parallelized model.

Every rank enters, one writes; the optimizer's shards go where each rank finds its own. A checkpoint
is written aside, and read when it is whole (``hf_sp.checkpoint.folder``).
"""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

import hf_sp.integrations.processes as processes
from hf_sp.checkpoint import folder as folders
from hf_sp.checkpoint.background import Writing
from hf_sp.checkpoint.gather import gather_state_dict
from hf_sp.checkpoint.optimizer import (
    OPTIMIZER_DIRECTORY,
    load_full_optimizer,
    read_optimizer,
    write_optimizer,
)
from hf_sp.checkpoint.ranks import Together, ranks_of
from hf_sp.checkpoint.weights import WEIGHTS_DIRECTORY, read_weights, write_weights
from hf_sp.integrations.stock_files import (
    read_plain,
    refuse_missing,
    restore_random,
    without_tied,
)
from hf_sp.patching import Patch, Patches
from hf_sp.state import parallel_state

logger = logging.getLogger(__name__)

_WRITING: WeakKeyDictionary[Any, Writing] = WeakKeyDictionary()
"""By Trainer, the checkpoint that is being written while it trains."""

_RESUMED = "resume_from_checkpoint / load_best_model_at_end"

PATCHES = Patches(lambda trainer: parallel_state(trainer.model) is not None)
"""Patches of Trainers that train a parallelized model: their files."""


# --- saving -------------------------------------------------------------------------------------


@PATCHES.on(Trainer, "_save_checkpoint")
def write_aside(original: Patch, self: Any, model: Any, trial: Any) -> None:
    """Trainer writes file by file into the checkpoint's place, and deletes older ones by date.

    A kill would leave a half or a mixed checkpoint there; it pushes and deletes when all is done.
    """
    run = Path(self._get_output_dir(trial=trial))
    step = self.state.global_step
    target = run / f"checkpoint-{step}"
    entries = {"step": step, **folders.about(self.model)}
    _finish(self)
    if parallel_state(self.model).checkpoint == "dcp":  # type: ignore[union-attr]
        _WRITING[self] = Writing(ranks_of(self.model), target)
    writing = _WRITING.get(self)
    push, self.args.push_to_hub = self.args.push_to_hub, False
    best = self.state.best_model_checkpoint
    try:
        with folders.replacing(target, ranks_of(self.model), entries, writing=writing) as aside:
            vars(self)["_get_output_dir"] = lambda trial=None: str(aside.parent)
            original(self, model, trial)
            if self.state.best_model_checkpoint == str(aside):
                self.state.best_model_checkpoint = str(target)
                if self.args.should_save:
                    self.state.save_to_json(str(aside / TRAINER_STATE_NAME))
        best = self.state.best_model_checkpoint
    finally:
        if writing is not None and not writing.started:
            del _WRITING[self]
        self.state.best_model_checkpoint = best
        vars(self).pop("_get_output_dir", None)
        self.args.push_to_hub = push
    if push:
        _finish(self)
        self._push_from_checkpoint(str(target))
    if writing is None:
        _rotate(self, target)


def _rotate(trainer: Any, newest: Path) -> None:
    """Delete older checkpoints, when the newest is there."""
    if trainer.args.should_save:
        best = trainer.state.best_model_checkpoint
        keep = {newest} if best is None else {newest, Path(best)}
        folders.rotate(newest.parent, trainer.args.save_total_limit, keep)


def _finish(trainer: Any) -> None:
    """Wait for the checkpoint that is being written. To be called on every rank."""
    writing = _WRITING.pop(trainer, None)
    if writing is not None:
        writing.finish()
        _rotate(trainer, writing.folder)


@PATCHES.on(Trainer, "save_model")
def save_on_all_ranks(
    original: Patch,
    self: Any,
    output_dir: str | None = None,
    _internal_call: bool = False,
) -> None:
    """Trainer 5.17 calls ``_save`` on the writing rank alone, which would gather alone."""
    target = output_dir if output_dir is not None else self.args.output_dir
    if self.args.should_save:
        original(self, output_dir, _internal_call=_internal_call)
        return
    self._save(target)
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
    ranks = ranks_of(self.model)
    failing = Together(ranks, "the model could not be saved", target)
    with failing:
        if self.args.should_save:
            Path(target).mkdir(parents=True, exist_ok=True)
    writing = _WRITING.get(self)
    if writing is not None and not writing.started and isinstance(self.model, PreTrainedModel):
        write_weights(self.model, Path(target) / WEIGHTS_DIRECTORY, writing)
        with failing:
            if self.args.should_save:
                vars(self.model)["save_pretrained"] = partial(_save_configs, self.model)
                try:
                    original(self, target, state_dict)
                finally:
                    del vars(self.model)["save_pretrained"]
        return
    with failing:
        saves_itself = isinstance(self.model, PreTrainedModel) or hasattr(self.model, "peft_config")
        if not saves_itself and state_dict is None:
            state_dict = gather_state_dict(self.model, keep=self.args.should_save)
        if self.args.should_save:
            original(self, target, state_dict)
        elif saves_itself:
            self.model.save_pretrained(target, state_dict=state_dict, is_main_process=False)


def _save_configs(model: PreTrainedModel, folder: str, **_: Any) -> None:
    """What ``save_pretrained`` writes beside the weights."""
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


@PATCHES.on(Trainer, "_save_optimizer_and_scheduler")
def save_optimizer_shards(original: Patch, self: Any, output_dir: str) -> None:
    """Trainer writes the first rank's optimizer state, and gives it to every rank on resume."""
    directory = Path(output_dir) / OPTIMIZER_DIRECTORY
    write_optimizer(self.model, self.optimizer, directory, _WRITING.get(self))
    if self.args.should_save:
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)


# --- resuming -----------------------------------------------------------------------------------


@PATCHES.on(Trainer, "train")
def resume_from_complete(
    original: Patch, self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Trainer takes the greatest step whatever is in the folder, and reads it file by file."""
    ranks = ranks_of(self.model)
    if resume_from_checkpoint is True:
        resume_from_checkpoint = str(folders.last_complete(self.args.output_dir, ranks, self.model))
    elif resume_from_checkpoint:
        folders.check(resume_from_checkpoint, ranks, self.model)
    result = original(self, resume_from_checkpoint, *args, **kwargs)
    _finish(self)
    return result


@PATCHES.on(Trainer, "_load_best_model")
def check_best_model(original: Patch, self: Any) -> None:
    """As ``resume_from_complete``; it knows no shards."""
    _finish(self)
    best = Path(self.state.best_model_checkpoint)
    folders.check(best, ranks_of(self.model), self.model)
    if (best / WEIGHTS_DIRECTORY).is_dir():
        read_weights(self.model, best / WEIGHTS_DIRECTORY)
    else:
        original(self)


@PATCHES.on(Trainer, "_load_from_checkpoint")
def refuse_missing_adapters(
    original: Patch, self: Any, resume_from_checkpoint: str, model: Any = None
) -> None:
    """Trainer does not look at what PEFT missed, and trains on with fresh factors.

    It knows no shards.
    """
    target = self.model if model is None else model
    shards = Path(resume_from_checkpoint) / WEIGHTS_DIRECTORY
    if shards.is_dir():
        read_weights(target, shards)
        return
    results: list[Any] = []
    if hasattr(target, "peft_config"):
        load = target.load_adapter
        vars(target)["load_adapter"] = lambda *a, **k: results.append(load(*a, **k))
    try:
        original(self, resume_from_checkpoint, model)
    finally:
        vars(target).pop("load_adapter", None)
    refuse_missing({name for result in results for name in result.missing_keys}, _RESUMED)


MODEL_PATCHES = Patches(lambda model: parallel_state(model) is not None)
"""Patches of what is given a parallelized model."""


@MODEL_PATCHES.on(transformers.trainer, "load_sharded_checkpoint")
def load_all_files(
    original: Patch, model: Any, folder: Any, strict: bool = True, prefer_safe: bool = True
) -> Any:
    """It loads one file after the other: experts of one layer, which lie in several, are no whole.

    The files are mapped, not read into memory.
    """
    index = Path(folder) / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return original(model, folder, strict=strict, prefer_safe=prefer_safe)
    state: dict[str, Any] = {}
    for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        state |= load_file(folders.inside(Path(folder), name))
    return model.load_state_dict(state, strict=strict)


@PATCHES.on(Trainer, "_load_optimizer_and_scheduler")
def load_optimizer_shards(original: Patch, self: Any, checkpoint: str | None) -> None:
    """As ``save_optimizer_shards``; also takes a one-process ``optimizer.pt``."""
    if checkpoint is None:
        return
    folder = Path(checkpoint)
    ours, stock = folder / OPTIMIZER_DIRECTORY, folder / OPTIMIZER_NAME
    if ours.is_dir():
        read_optimizer(self.model, self.optimizer, ours)
    elif stock.is_file():
        load_full_optimizer(self.model, self.optimizer, read_plain(stock))
    else:
        logger.warning("No optimizer state in %s: optimizer and schedule start anew.", checkpoint)
        return
    self.lr_scheduler.load_state_dict(read_plain(folder / SCHEDULER_NAME))


@PATCHES.on(Trainer, "_load_rng_state")
def load_rank0_rng(original: Patch, self: Any, checkpoint: str | None) -> None:
    """A checkpoint of another degree lacks some ranks' files, which Trainer passes over.

    All ranks share one random state, so the first rank's serves all.
    """
    if checkpoint is None:
        return
    folder, ranks = Path(checkpoint), ranks_of(self.model)
    files = {f.name: f for f in folder.glob("rng_state*.pth")}
    own = "rng_state.pth" if ranks.size == 1 else f"rng_state_{ranks.rank}.pth"
    first = files.get("rng_state.pth", files.get("rng_state_0.pth"))
    with Together(ranks, "the random state cannot be read", folder):
        if len(files) == ranks.size and own in files:
            with processes.as_ranks():
                original(self, checkpoint)
        elif first is not None:
            saved = read_plain(first)
            restore_random(*(saved.get(k) for k in ("python", "numpy", "cpu", "cuda")))


@PATCHES.on(Trainer, "_issue_warnings_after_load")
def refuse_missing_weights(original: Patch, self: Any, load_result: Any) -> None:
    """Trainer logs a warning and trains on with whatever the model had."""
    ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or [])
    refuse_missing(without_tied(self.model, set(load_result.missing_keys) - ignored), _RESUMED)
    original(self, load_result)
