"""What goes wrong without each patch of what is saved, and of what is read again."""

from __future__ import annotations

import random
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.trainer_callback import TrainerState

from integrations.rows import PerRank, Raises, row

LONE = Raises("CheckpointError", "no call from ranks [1]")


def _trained(scene, **options):
    trainer = scene.trainer("probe", max_steps=1, gradient_accumulation_steps=1, **options)
    trainer.train()
    return trainer


# Whole tensors that a rank holds at a time: the writing one all 21, any other the one in work, and
# its own five norms.
@row("PreTrainedModel.save_pretrained", right=PerRank(21, 6), wrong=21)
def held_while_saving(scene):
    model = scene.tiny()
    storages, most, original = [], [0], DTensor.full_tensor

    def spy(self, **kwargs):
        whole = original(self, **kwargs)
        storages.append(StorageWeakRef(whole.untyped_storage()))
        most.append(sum(not one.expired() for one in storages))
        return whole

    with mock.patch.object(DTensor, "full_tensor", spy):
        model.save_pretrained(scene.fresh("held"))
    return max(most)


@row(
    "PreTrainedModel.resize_token_embeddings",
    right=Raises("ConfigError", "cannot be resized"),
    wrong=Raises("RuntimeError", "got mixed torch.Tensor and DTensor"),
)
def resize(scene):
    return scene.tiny().resize_token_embeddings(70).weight.shape


# 5.17 calls ``_save`` on the writing rank alone.
@row("Trainer.save_model", right=True, wrong=PerRank(LONE, False), newest=True)
def written_by_save_model(scene):
    trainer = scene.trainer("probe")
    folder = scene.fresh("model")
    trainer.save_model(str(folder))
    return (folder / "model.safetensors").exists()


# In 5.17 all ranks come to ``save_pretrained``, if they come here.
@row("Trainer._save", right=True, wrong=True, newest=PerRank(LONE, False))
def written_by_save(scene):
    trainer = scene.trainer("probe")
    folder = scene.fresh("save")
    trainer._save(str(folder))
    return (folder / "model.safetensors").exists()


@row("Trainer._save_checkpoint", right=True, wrong=PerRank(True, False))
def checkpoint_is_whole_when_a_rank_goes_on(scene):
    trainer = _trained(scene)
    trainer.args.output_dir = str(scene.fresh("race"))
    original = TrainerState.save_to_json

    def late(self, path):
        time.sleep(0.5)
        original(self, path)

    with mock.patch.object(TrainerState, "save_to_json", late):
        trainer._save_checkpoint(trainer.model, None)
    folder = Path(trainer._get_output_dir(None))
    return (folder / "checkpoint-1" / "trainer_state.json").exists()


@row("Trainer._save_optimizer_and_scheduler", right=["optimizer_shards"], wrong=["optimizer.pt"])
def optimizer_files(scene):
    trainer = _trained(scene)
    folder = scene.fresh("optimizer")
    trainer._save_optimizer_and_scheduler(str(folder))
    dist.barrier()
    return sorted(p.name for p in folder.iterdir() if "optimizer" in p.name)


# Trainer takes the directory for a sign that there is a file.
@row(
    "Trainer._load_optimizer_and_scheduler",
    right=21,
    wrong=Raises("FileNotFoundError", "optimizer.pt"),
)
def states_after_resume(scene):
    trainer = _trained(scene)
    folder = scene.fresh("resumed")
    trainer._save_optimizer_and_scheduler(str(folder))
    dist.barrier()
    again = scene.trainer("probe")
    again.create_optimizer_and_scheduler(num_training_steps=2)
    again._load_optimizer_and_scheduler(str(folder))
    return len(again.optimizer.state)


# Kinds of draws after the resume.
@row("Trainer._load_rng_state", right=1, wrong=2)
def draws_after_a_resume_from_one_process(scene):
    folder = scene.fresh("random")
    if scene.rank == 0:
        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        }
        torch.save(states, folder / "rng_state.pth")
    dist.barrier()
    trainer = scene.trainer("probe")
    torch.manual_seed(100 + scene.rank)
    trainer._load_rng_state(str(folder))
    return len(set(scene.everywhere(float(torch.rand(())))))


@row(
    "Trainer._issue_warnings_after_load",
    right=Raises("CheckpointError", "the checkpoint lacks weights of the model"),
    wrong="taken",
)
def checkpoint_without_weights(scene):
    trainer = scene.trainer("probe")
    trainer._issue_warnings_after_load(trainer.model.load_state_dict({}, strict=False))
    return "taken"
