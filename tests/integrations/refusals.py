"""Jobs: what a Trainer over a parallelized model is refused, and what it must leave alone."""

from __future__ import annotations

import os

import torch
from accelerate import ParallelismConfig
from transformers import Trainer

from integrations.data import Rows, collate
from integrations.scene import refused


def refusals(scene):
    model = scene.tiny()
    dead = torch.optim.AdamW(scene.tiny(parallel=False).parameters())

    def make(**kwargs):
        return lambda: scene.trainer("refused", model, **kwargs)

    other = ParallelismConfig(tp_size=1, dp_shard_size=scene.world)
    ulysses = ParallelismConfig(tp_size=scene.world, sp_size=4)
    report = {
        "optimizer": refused(make(optimizers=(dead, None))),
        "liger": refused(make(use_liger_kernel=True)),
        "parallelism_config": refused(make(parallelism_config=other)),
        "sp_size": refused(make(parallelism_config=ulysses)),
    }
    for flag in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        arguments = scene.arguments("refused")
        arguments.world_size  # noqa: B018  (the distributed setup, before the flag is set)
        os.environ[flag] = "true"
        try:
            report[flag] = refused(lambda arguments=arguments: _trainer(model, arguments))
        finally:
            del os.environ[flag]
    return report


def agreeing(scene):
    """A ParallelismConfig that says what the model says: steps made with it."""
    config = ParallelismConfig(tp_size=scene.world)
    trainer = scene.trainer("agreeing", parallelism_config=config, max_steps=1)
    trainer.train()
    return trainer.state.global_step


def others(scene, train=True):
    """A Trainer of ours, one over a plain model, one of ours, with one set of arguments.

    The processes that the two later ones see.
    """
    shared = scene.arguments("shared", max_steps=1)
    first = _trainer(scene.tiny(), shared)
    if train:
        first.train()
    found = []
    for parallel in (False, True):
        found.append(_trainer(scene.tiny(parallel=parallel), shared).accelerator.num_processes)
    return found


def _trainer(model, arguments):
    return Trainer(model=model, args=arguments, train_dataset=Rows(4), data_collator=collate)
