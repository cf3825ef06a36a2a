"""The stock ``Trainer`` and a parallelized model.

A Trainer is ours when ``parallel_state(trainer.model)`` is not None. What it does wrong with such a
model, in transformers 5.17 to 5.24, is corrected here one method at a time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch import Tensor
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

import hf_sp.integrations.optimizers as optimizers
import hf_sp.integrations.processes as processes
import hf_sp.integrations.trainer_ranks as trainer_ranks
import hf_sp.integrations.trl_patches as trl_patches
from hf_sp.checkpoint.ranks import ranks_of
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
    if args.world_size != state.everyone.size:
        raise ConfigError(
            "Trainer does not see the processes that the model is sharded over",
            where=where,
            got=f"args.world_size={args.world_size}, the model is on {state.everyone.size} ranks",
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
    for engine in processes.OTHER_ENGINES:
        option, flag = engine.lower(), f"ACCELERATE_USE_{engine}"
        if getattr(args, option, None) or os.environ.get(flag, "false").lower() == "true":
            raise processes.refuse_engine(engine, f"{where}({option}=...) or {flag}")
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
    nodes = state.everyone.size // int(os.environ.get("LOCAL_WORLD_SIZE", state.everyone.size))
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
def show_groups_at_construction(original: Patch, self: Any) -> Any:
    """Trainer would take each rank for a process with a batch of its own.

    accelerate's state outlives a Trainer: the next one with the same arguments, over a parallelized
    model or over a plain one, would be shown the groups of the one before.
    """
    processes.release()
    state = parallel_state(self.model)
    if state is None:
        processes.check_holder(self.model, "Trainer(model=...)")
        return original(self)
    check_arguments(self.args, state)
    trl_patches.install(self)
    given = self.args.parallelism_config
    processes.check_config(state, given, "TrainingArguments(parallelism_config=...)")
    self.args.parallelism_config = None
    try:
        original(self)
    finally:
        self.args.parallelism_config = given
    processes.adopt(self.accelerator, state, "Trainer")


@ALL_PATCHES.on(Trainer, "call_model_init")
def show_groups_after_model_init(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """With ``model_init`` the accelerator is made before the model."""
    model = original(self, *args, **kwargs)
    state = parallel_state(model)
    if state is not None:
        processes.release()
        check_arguments(self.args, state)
        processes.adopt(self.accelerator, state, "Trainer(model_init=...)")
    return model


@PATCHES.on(Trainer, "_validate_args")
def refuse_foreign_optimizer(original: Patch, self: Any) -> None:
    """``Trainer(optimizers=...)`` made before ``parallelize`` trains parameters nobody uses."""
    original(self)
    if self.optimizer is not None:
        processes.check_optimizer([self.optimizer], [self.model], "Trainer(optimizers=...)")


@PATCHES.on(Trainer, "_move_model_to_device")
def leave_offloaded_where_it_is(original: Patch, self: Any, model: Any, device: Any) -> None:
    """Trainer would move to the GPU what FSDP's offload policy keeps on the CPU."""
    if not state_of(self).offloaded:
        original(self, model, device)


@PATCHES.on(Trainer, "store_flos")
def count_flos_once(original: Patch, self: Any) -> None:
    """Trainer sums over all ranks the operations of the whole model (DTensors count whole)."""
    self.current_flos /= state_of(self).tp
    original(self)


def _counts_for_all(trainer: Any) -> bool:
    """Whether a loss is a sum divided by the tokens of all groups, times their number."""
    takes = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    return trainer.args.average_tokens_across_devices and takes


def _own_rows(loader: Any, state: ParallelState, remainder: int, rows: int) -> int:
    """How many rows of this group's part of a last batch are not repeated; all if nobody knows."""
    sampler = loader.batch_sampler
    while isinstance(sampler, SkipBatchSampler):
        sampler = sampler.batch_sampler
    if isinstance(sampler, BatchSamplerShard) and not sampler.drop_last:
        # Counted anew: after a resume in the middle of an epoch accelerate has not.
        groups = 1 if sampler.split_batches else sampler.num_processes
        remainder = len(loader.dataset) % ((sampler.batch_size or rows) * groups)
    dealers = (sampler, loader.dataset, getattr(loader, "state", None))
    # Another sampler (batch_rebalance) has dealt them out itself.
    dealt = any(getattr(dealer, "num_processes", 1) == state.data for dealer in dealers)
    if not dealt or remainder < 1:
        return rows
    return min(remainder - processes.group_index(state) * rows, rows)


def _without_repeated(trainer: Any, inputs: Any) -> Any:
    """A last batch whose rows beyond the data count for nothing: their labels are ignored.

    accelerate fills the last batch of all groups with rows from the beginning.
    """
    state, gradients = state_of(trainer), trainer.accelerator.gradient_state
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if state.data == 1 or not gradients.end_of_dataloader or not isinstance(labels, Tensor):
        return inputs
    if labels.dim() < 2 or labels.is_floating_point():
        return inputs
    own = _own_rows(gradients.active_dataloader, state, gradients.remainder, len(labels))
    # A batch without any label has its part of a sum, and no mean.
    if own == len(labels) or (own <= 0 and not _counts_for_all(trainer)):
        return inputs
    labels = labels.clone()
    labels[max(own, 0) :] = -100
    return type(inputs)({**inputs, "labels": labels})


@PATCHES.on(Trainer, "get_batch_samples")
def train_on_rows_once(
    original: Patch, self: Any, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any
) -> Any:
    """Trainer trains twice on the rows that accelerate fills an epoch's last batch with."""
    batches = (_without_repeated(self, inputs) for inputs in epoch_iterator)
    return original(self, batches, *args, **kwargs)


@PATCHES.on(Trainer, "prediction_step")
def evaluate_rows_once(
    original: Patch,
    self: Any,
    model: Any,
    inputs: Any,
    prediction_loss_only: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Logits of the whole vocabulary are made in eval; often nobody would read them.

    A subclass that computes its own loss may read them, so it gets them. And of a last batch
    Trainer weighs the groups' losses, which are parts of one mean, by their numbers of rows.
    """
    wants = not prediction_loss_only or type(self).compute_loss is not Trainer.compute_loss
    with contextlib.nullcontext() if wants else state_of(self).no_logits():
        found = original(self, model, inputs, prediction_loss_only, *args, **kwargs)
    if found[0] is None or state_of(self).data == 1 or not _counts_for_all(self):
        return found
    return (self.accelerator.reduce(found[0], "mean"), *found[1:])


@PATCHES.on(Trainer, "_get_train_sampler")
def group_lengths_of_all_groups(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Trainer sorts by length in batches of one process."""
    sampler = original(self, *args, **kwargs)
    if isinstance(sampler, LengthGroupedSampler):
        sampler.batch_size *= state_of(self).data
    return sampler


@PATCHES.on(Trainer, "evaluation_loop")
def evaluate_alike(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Ranks decide by their own metrics what to save and when to stop: they must be the same.

    ``compute_metrics`` is the user's and may be random. And the rows that fill the last batch have
    a part in its mean loss, whoever's ``prediction_step`` computes it (TRL's are their own).
    """
    step, own = self.prediction_step, vars(self).get("prediction_step")

    def step_once(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return step(model, _without_repeated(self, inputs), *args, **kwargs)

    vars(self)["prediction_step"] = step_once
    try:
        output = original(self, *args, **kwargs)
    finally:
        vars(self).pop("prediction_step")
        if own is not None:
            vars(self)["prediction_step"] = own
    return output._replace(metrics=ranks_of(self.model).tell(output.metrics))


@PATCHES.on(Trainer, "log")
def agree_after_log(
    original: Patch, self: Any, logs: dict[str, Any], start_time: float | None = None
) -> None:
    """What a callback asks for in ``on_log`` on one rank alone is looked at next."""
    original(self, logs, start_time)
    if start_time is not None:
        # Trainer's own, on all ranks: users log on one rank.
        trainer_ranks.agree_on_control(self.control, state_of(self))
