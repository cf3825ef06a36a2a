"""What goes wrong without each patch of what is saved, and of what is read again."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import transformers.trainer
from harness import tiny
from loading.jobs import peak
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.trainer_callback import TrainerState

import hf_sp
from hf_sp.checkpoint.optimizer import OPTIMIZER_DIRECTORY
from hf_sp.errors import CheckpointError
from integrations.rows import PerRank, Raises, row
from integrations.rows_peft import adapted
from integrations.scene import refused, same, weights

LONE = Raises("CheckpointError", "no call from ranks [1]")
# Stand-ins of tensors were taken for tensors.
NO_VALUES = Raises("CheckpointError", "Cannot copy out of meta tensor")


def _trained(scene, **options):
    options = {"max_steps": 1, "gradient_accumulation_steps": 1, **options}
    trainer = scene.trainer("probe", **options)
    trainer.train()
    return trainer


def _checkpoints(scene, name, steps=1):
    """A Trainer that has written a checkpoint after every step, and their folder."""
    runs = scene.fresh(name)
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(runs)}
    return _trained(scene, max_steps=steps, **options), runs


def _change(scene, path, change):
    """Change a file of tensors."""
    if scene.rank == 0:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    dist.barrier()


# Whole tensors that a rank holds at a time: the writing one all 21 of its file, of which the
# embedding is a copy without padding; any other the one in work, and its own five norms. Without
# the patch transformers takes shards for tensors.
@row(
    "PreTrainedModel.save_pretrained",
    right=PerRank(20, 6),
    wrong=PerRank(Raises("RuntimeError", "an invalid python storage"), 0),
)
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


@row("PreTrainedModel.gather_sharded_state_dict_for_save", right=True, wrong=NO_VALUES)
@row("transformers.modeling_utils.safe_save_file", right=True, wrong=NO_VALUES)
def saved_bit_for_bit(scene):
    model = scene.tiny()
    folder = scene.fresh("whole")
    model.save_pretrained(folder)
    return same(load_file(folder / "model.safetensors"), weights(model))


# Barriers of a rank, which nobody waits in here. One that the writing rank enters alone hangs.
@row("PreTrainedModel.barrier_after_gathered_checkpoint_save", right=0, wrong=PerRank(1, 0))
def barriers_of_a_save(scene):
    model = scene.tiny()
    folder = scene.fresh("barrier")
    with mock.patch.object(dist, "barrier") as barrier:
        model.save_pretrained(folder)
    return barrier.call_count


@row(
    "PreTrainedModel.resize_token_embeddings",
    right=Raises("ConfigError", "cannot be resized"),
    wrong=Raises("RuntimeError", "got mixed torch.Tensor and DTensor"),
)
def resize(scene):
    return scene.tiny().resize_token_embeddings(70, mean_resizing=False).weight.shape


# 5.17 calls ``_save`` on the writing rank alone, where it waits for the others.
@row("Trainer.save_model", right=1, wrong=PerRank(1, 0), newest=1)
def calls_of_save(scene):
    trainer = scene.trainer("probe")
    calls = []
    trainer._save = lambda *args, **kwargs: calls.append(1)
    trainer.save_model(str(scene.fresh("model")))
    return len(calls)


# In 5.17 all ranks come to ``save_pretrained``, if they come here.
@row("Trainer._save", right=True, wrong=True, newest=PerRank(LONE, False))
def written_by_save(scene):
    trainer = scene.trainer("probe")
    folder = scene.fresh("save")
    trainer._save(str(folder))
    return (folder / "model.safetensors").exists()


# What a rank raises, and whether half a checkpoint is there.
@row(
    "Trainer._save_checkpoint",
    right=["CheckpointError", False],
    wrong=PerRank(["OSError", True], [None, True]),
)
def checkpoint_that_cannot_be_written(scene):
    trainer = _trained(scene, output_dir=str(scene.fresh("full")))
    full = mock.Mock(side_effect=OSError("No space left on device"))
    raised = None
    with mock.patch.object(TrainerState, "save_to_json", full):
        try:
            trainer._save_checkpoint(trainer.model, None)
        except (OSError, CheckpointError) as error:
            raised = type(error).__name__
    dist.barrier()
    return [raised, (Path(trainer.args.output_dir) / "checkpoint-1").exists()]


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


# AdamW's count after the third step, and what the checkpoint meets that lacks its optimizer.
@row("Trainer.train", right=[3.0, "CheckpointError"], wrong=[1.0, None])
def steps_of_a_run_whose_last_checkpoint_is_half(scene):
    _, runs = _checkpoints(scene, "half", steps=2)
    half = runs / "checkpoint-2"
    if scene.rank == 0:
        shutil.rmtree(half / OPTIMIZER_DIRECTORY)
    dist.barrier()
    options = {"max_steps": 3, "gradient_accumulation_steps": 1}
    again = scene.trainer("probe", output_dir=str(runs), **options)
    again.train(resume_from_checkpoint=True)
    step = next(iter(again.optimizer.state.values()))["step"]
    return [float(step), refused(lambda: again.train(resume_from_checkpoint=str(half)))["type"]]


@row(
    "Trainer._load_best_model",
    right=Raises("CheckpointError", "its digest differs"),
    wrong="taken",
)
def best_model_that_was_changed(scene):
    trainer, runs = _checkpoints(scene, "best")
    best = runs / "checkpoint-1"
    _change(scene, best / "model.safetensors", lambda tensors: tensors["lm_head.weight"].zero_())
    trainer.state.best_model_checkpoint = str(best)
    trainer._load_best_model()
    return "taken"


@row(
    "Trainer._load_from_checkpoint",
    right=Raises("CheckpointError", "the checkpoint lacks weights of the model"),
    wrong="taken",
)
def checkpoint_without_a_factor(scene):
    model = adapted(scene)
    folder = scene.fresh("factor")
    model.save_pretrained(str(folder))
    _change(
        scene,
        folder / "adapter_model.safetensors",
        lambda tensors: tensors.pop(next(n for n in tensors if "lora_B" in n)),
    )
    scene.trainer("probe", model)._load_from_checkpoint(str(folder))
    return "taken"


@row(
    "transformers.trainer.load_sharded_checkpoint",
    right=True,
    wrong=Raises("RuntimeError", "above report"),
)
def experts_in_several_files(scene):
    saved, other = (hf_sp.parallelize(tiny.build("qwen3_moe", seed=seed)) for seed in (0, 1))
    folder = scene.fresh("experts")
    saved.save_pretrained(str(folder), max_shard_size="40KB")
    transformers.trainer.load_sharded_checkpoint(other, str(folder), strict=False)
    return same(weights(saved), weights(other))


# Kinds of draws after the resume.
@row("Trainer._load_rng_state", right=1, wrong=2)
def draws_after_a_resume_of_several_ranks(scene):
    folder = scene.fresh("random")
    if scene.rank == 0:
        states = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        }
        torch.save(states, folder / "rng_state_0.pth")
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


# Read, stacked, and stacked side by side.
@row("WeightConverter.convert", right=True, wrong=False)
def memory_of_experts(scene):
    """Whether the experts' part is in memory once."""
    folder = scene.fresh("experts")
    if scene.rank == 0:
        tiny.build("mixtral", torch.float32).save_pretrained(folder)
    scene.everywhere(None)
    found = peak(str(folder), {"tp": scene.world}, dtype=torch.bfloat16)
    return found["peak"] <= 1.02 * found["shard"]


# q, k and v in one linear, of 8, 4 and 4 heads.
@row("DtensorShardOperation._compute_strided_slice", right=True, wrong=False)
def packed_linear_that_is_read_by_shards(scene):
    folder = scene.fresh("packed")
    whole = tiny.build("phi3", torch.float32)
    if scene.rank == 0:
        whole.save_pretrained(folder)
    scene.everywhere(None)
    return same(weights(whole), weights(hf_sp.from_pretrained(folder, tp=scene.world)))


# transformers loads the whole model, and nobody has parallelized it.
@row(
    "transformers.modeling_utils.convert_and_load_state_dict_in_model",
    right=[8, 16],
    wrong=Raises("AssertionError", ""),
)
def rows_of_what_is_loaded(scene):
    folder = scene.fresh("whole")
    if scene.rank == 0:
        scene.tiny(parallel=False).save_pretrained(folder)
    scene.everywhere(None)
    model = hf_sp.from_pretrained(folder, tp=scene.world)
    return list(model.model.layers[0].self_attn.q_proj.weight.to_local().shape)
