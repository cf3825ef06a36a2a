"""The stock ``Trainer`` and a parallelized model.

A Trainer is ours when ``parallel_state(trainer.model)`` is not None. What it does wrong with such a
model, in transformers 5.17 to 5.24, is corrected here one method at a time.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import seed_worker

import hf_sp.integrations.accelerate_mesh as accelerate_mesh
import hf_sp.integrations.optimizers as optimizers
import hf_sp.integrations.trainer_ranks as trainer_ranks
import hf_sp.integrations.trl_patches as trl_patches
from hf_sp.errors import ConfigError, HfSpError
from hf_sp.patching import Patch, Patches
from hf_sp.state import ParallelState, parallel_state

PATCHES = Patches(lambda trainer: parallel_state(trainer.model) is not None)
"""Patches of Trainers that train a parallelized model."""


def state_of(trainer: Any) -> ParallelState:
    """The parallel state of the model that a Trainer of ours trains."""
    state = parallel_state(trainer.model)
    assert state is not None
    return state


def check_arguments(args: TrainingArguments, state: ParallelState) -> None:
    """Refuse (ConfigError, on all ranks) arguments that train a parallelized model wrongly."""
    problem = None
    try:
        _check_own(args, state)
    except HfSpError as error:
        problem = error
    trainer_ranks.agree_on_arguments(args, state, problem)
    trainer_ranks.apply_timeout(args, state)


def _check_own(args: TrainingArguments, state: ParallelState) -> None:
    where = "TrainingArguments"
    accelerate_mesh.check_world(state, "Trainer")
    if args.world_size != state.tp:
        raise ConfigError(
            "Trainer does not see the processes that the model is sharded over",
            where=where,
            got=f"args.world_size={args.world_size}, tp={state.tp}",
            rule="every process would take itself for the only one, and write the checkpoint",
            remedy="start the script with torchrun or accelerate launch",
        )
    if args.n_gpu > 1:
        raise ConfigError(
            "Trainer would wrap the model in DataParallel",
            where=where,
            got=f"n_gpu={args.n_gpu} in one process",
            rule="one process per GPU",
            remedy="start the script with torchrun, or set CUDA_VISIBLE_DEVICES to one GPU",
        )
    for engine in accelerate_mesh.OTHER_ENGINES:
        option, flag = engine.lower(), f"ACCELERATE_USE_{engine}"
        if getattr(args, option, None) or os.environ.get(flag, "false").lower() == "true":
            raise accelerate_mesh.refuse_engine(engine, f"{where}({option}=...) or {flag}")
    if args.use_liger_kernel:
        raise ConfigError(
            "use_liger_kernel=True cannot be applied to a parallelized model",
            where=where,
            rule="Liger replaces the forwards that hf_sp has taken over",
            legal="use_liger_kernel=False",
        )
    optimizers.check_name(args.optim)
    if args.debug:
        raise ConfigError(
            "debug='underflow_overflow' cannot look into a parallelized model",
            rule="it prints weights as plain tensors, and ends the one rank that meets an overflow",
            remedy="with torch.autograd.detect_anomaly(): trainer.train()",
        )
    nodes = args.world_size // int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    if args.save_on_each_node and nodes > 1:
        raise ConfigError(
            "save_on_each_node=True is not supported on several nodes",
            where=where,
            got=f"{nodes} nodes",
            rule="the optimizer's shards of all nodes are read from one directory",
            remedy="write to a file system that all nodes share",
        )


ALL_PATCHES = Patches(lambda _: True)
"""Patches that have to look at the model first."""


@ALL_PATCHES.on(Trainer, "create_accelerator_and_postprocess")
def attach_mesh_at_construction(original: Patch, self: Any) -> Any:
    """Trainer overwrites a given ParallelismConfig's sizes silently, and makes a mesh of its own.

    accelerate's state outlives a Trainer: the next one with the same arguments, over a parallelized
    model or over a plain one, would be given the mesh of the one before.
    """
    state = parallel_state(self.model)
    if state is None:
        accelerate_mesh.check_holder(self.model, "Trainer(model=...)")
        accelerate_mesh.release()
        return original(self)
    check_arguments(self.args, state)
    trl_patches.install(self)
    given = self.args.parallelism_config
    where = "TrainingArguments(parallelism_config=...)"
    self.args.parallelism_config = accelerate_mesh.config_for(state, given, where)
    try:
        original(self)
    finally:
        self.args.parallelism_config = given
    accelerate_mesh.adopt(self.accelerator, state, "Trainer")


@ALL_PATCHES.on(Trainer, "call_model_init")
def attach_mesh_after_model_init(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """With ``model_init`` the accelerator is made before the model."""
    model = original(self, *args, **kwargs)
    state = parallel_state(model)
    if state is not None:
        check_arguments(self.args, state)
        accelerate_mesh.adopt(self.accelerator, state, "Trainer(model_init=...)")
    return model


@PATCHES.on(Trainer, "_validate_args")
def refuse_foreign_optimizer(original: Patch, self: Any) -> None:
    """``Trainer(optimizers=...)`` made before ``parallelize`` trains parameters nobody uses."""
    original(self)
    if self.optimizer is not None:
        accelerate_mesh.check_optimizer([self.optimizer], [self.model], "Trainer(optimizers=...)")


@PATCHES.on(Trainer, "_get_train_sampler")
def rebalance_without_tp_ranks(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """``batch_rebalance`` deals micro-batches out to all processes, tp ranks among them."""
    sampler = original(self, *args, **kwargs)
    if not isinstance(sampler, BatchRebalanceSampler):
        return sampler
    return BatchRebalanceSampler(
        sampler.lengths,
        sampler.effective_batch_size // sampler.dp_size,
        dp_size=1,
        grad_accum=sampler.grad_accum,
        drop_last=sampler.drop_last,
    )


@PATCHES.on(Trainer, "_get_dataloader")
def seed_workers_alike(original: Patch, self: Any, *args: Any, **kwargs: Any) -> DataLoader:
    """Trainer seeds loader workers by rank: a random collator would give each its own batch."""
    loader = original(self, *args, **kwargs)
    inner: Any = getattr(loader, "base_dataloader", loader)
    seed = inner.worker_init_fn
    if isinstance(seed, functools.partial) and seed.func is seed_worker:
        inner.worker_init_fn = functools.partial(seed, rank=0)
    return loader


@PATCHES.on(Trainer, "_get_num_items_in_batch")
def count_labels_once(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Trainer divides by tp what it gathered; not gathered, the loss is tp times too big.

    ``average_tokens_across_devices=False`` skips the gather but not the division (5.17: a floor
    division at that).
    """
    asked = self.args.average_tokens_across_devices
    # The gather over equal batches and the division by tp give the local count.
    self.args.average_tokens_across_devices = True
    try:
        return original(self, *args, **kwargs)
    finally:
        self.args.average_tokens_across_devices = asked


@PATCHES.on(Trainer, "_track_num_input_tokens")
def count_tokens_once(original: Patch, self: Any, inputs: Any) -> None:
    """Trainer sums the tokens of all ranks, which are the same tokens."""
    before = self.state.num_input_tokens_seen
    original(self, inputs)
    added = self.state.num_input_tokens_seen - before
    self.state.num_input_tokens_seen = before + added // state_of(self).tp


@PATCHES.on(Trainer, "store_flos")
def count_flos_once(original: Patch, self: Any) -> None:
    """Trainer sums over all ranks the operations of the whole model (DTensors count whole)."""
    self.current_flos /= state_of(self).tp
    original(self)


@PATCHES.on(Trainer, "prediction_step")
def skip_logits_for_loss(
    original: Patch,
    self: Any,
    model: Any,
    inputs: Any,
    prediction_loss_only: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Logits of the whole vocabulary are made in eval; here nobody would read them.

    A subclass that computes its own loss may read them (TRL does), so it gets them.
    """
    wants = not prediction_loss_only or type(self).compute_loss is not Trainer.compute_loss
    with contextlib.nullcontext() if wants else state_of(self).no_logits():
        return original(self, model, inputs, prediction_loss_only, *args, **kwargs)


@PATCHES.on(Trainer, "evaluation_loop")
def broadcast_metrics(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Ranks decide by their own metrics what to save and when to stop: they must be the same.

    ``compute_metrics`` is the user's and may be random.
    """
    output = original(self, *args, **kwargs)
    state_of(self).eval_samples = output.num_samples
    told = [output.metrics]
    dist.broadcast_object_list(told, group=state_of(self).group, group_src=0)
    return output._replace(metrics=told[0])


def _correct_speed(trainer: Any, metrics: dict[str, Any]) -> None:
    suffix = "_steps_per_second"
    samples = state_of(trainer).eval_samples
    for key in [k for k in metrics if k.endswith(suffix) and not k.startswith("train")]:
        runtime = metrics.get(key.removesuffix(suffix) + "_runtime", 0)
        if runtime:
            metrics[key] = round(math.ceil(samples / trainer.args.eval_batch_size) / runtime, 3)


@PATCHES.on(Trainer, "log")
def correct_evaluation_speed(
    original: Patch, self: Any, logs: dict[str, Any], start_time: float | None = None
) -> None:
    """Trainer counts a step of evaluation as one batch on every process."""
    _correct_speed(self, logs)
    original(self, logs, start_time)
    if start_time is not None:
        # Trainer's own, on all ranks: what a callback asks for in on_log is looked at next.
        trainer_ranks.agree_on_control(self.control, state_of(self))


@PATCHES.on(Trainer, "predict")
def correct_prediction_speed(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """As ``correct_evaluation_speed``."""
    output = original(self, *args, **kwargs)
    _correct_speed(self, output.metrics)
    return output
