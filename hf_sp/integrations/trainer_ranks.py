"""The stock ``Trainer``: what its ranks have to decide alike, with a parallelized model.

Arguments are compared when the Trainer is made; a stop, a save or an evaluation that a callback
asks for on one rank (a time limit, SIGTERM) is done by all.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_callback import CallbackHandler, TrainerControl

from hf_sp.checks import agree
from hf_sp.comm.calls import exchange
from hf_sp.errors import HfSpError
from hf_sp.patching import Patch, Patches
from hf_sp.state import ParallelState, parallel_state
from hf_sp.torch_private import process_group, set_timeout

_ALIKE = """
per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps learning_rate
lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args
optim_target_modules weight_decay max_grad_norm adam_beta1 adam_beta2 adam_epsilon
label_smoothing_factor neftune_noise_alpha max_steps num_train_epochs seed data_seed
full_determinism bf16 fp16 bf16_full_eval fp16_full_eval gradient_checkpointing logging_strategy
logging_steps logging_first_step save_strategy save_steps save_only_model eval_strategy eval_steps
eval_delay eval_on_start load_best_model_at_end metric_for_best_model greater_is_better
prediction_loss_only batch_eval_metrics eval_accumulation_steps train_sampling_strategy
group_by_length dataloader_drop_last ignore_data_skip dataloader_num_workers
average_tokens_across_devices include_num_input_tokens_seen remove_unused_columns
auto_find_batch_size enable_jit_checkpoint accelerator_config ddp_timeout
"""
"""Arguments by which ranks compute or decide; absent ones are those of another version."""


def agree_on_arguments(
    args: TrainingArguments, state: ParallelState, problem: HfSpError | None
) -> None:
    """Raise on every rank if one refuses its arguments (``problem``), or if they differ.

    Collectives: 1 all-gather of a text.
    """
    # Functions among them have an address of their own on each rank.
    mine = {n: re.sub(" at 0x[0-9a-f]+", "", repr(getattr(args, n, None))) for n in _ALIKE.split()}
    rule = "what all ranks hold alike would drift apart, or a rank would wait for the others"
    agree(state.whole, problem, mine, "the ranks have different TrainingArguments", rule)


def apply_timeout(args: TrainingArguments, state: ParallelState) -> None:
    """Give the process groups that ``parallelize`` has made the ``ddp_timeout`` of the arguments.

    Stock arguments start the groups themselves. One that the user has not set changes nothing.
    """
    if args.ddp_timeout == TrainingArguments.ddp_timeout:
        return
    named = [*state.peers, *([] if state.parts is None else state.parts.groups)]
    groups = (state.group, state.all_ranks, *state.whole.get_all_groups())
    for group in (None, *groups, *map(process_group, named)):
        set_timeout(group, timedelta(seconds=args.ddp_timeout))


PATCHES = Patches(lambda handler: parallel_state(handler.model) is not None)
"""Patches of what calls the callbacks of a Trainer."""

_FLAGS = tuple(TrainerControl.__dataclass_fields__)
# After these Trainer looks at what callbacks want. Not on_log: users log on one rank.
_ASKED_AFTER = ("on_step_end", "on_substep_end", "on_epoch_end", "on_evaluate", "on_save")


def agree_on_control(control: TrainerControl, state: ParallelState) -> None:
    """Let every rank do what any wants to: stop, save, evaluate, log.

    Collectives: 1 all-gather of 40 bytes a rank; none on one rank.
    """
    if state.everyone.size == 1:
        return
    wanted = sum(bool(getattr(control, name)) << i for i, name in enumerate(_FLAGS))
    call = "Trainer between two batches"
    for other, *_ in exchange(state.all_ranks, state.mesh.device_type, call, (wanted,)):
        wanted |= int(other)
    for i, name in enumerate(_FLAGS):
        setattr(control, name, bool(wanted >> i & 1))


@PATCHES.on(CallbackHandler, "call_event")
def decide_together(
    original: Patch, self: Any, event: str, args: Any, state: Any, control: Any, **kwargs: Any
) -> Any:
    """A callback that asks on one rank alone would leave the others in a collective."""
    control = original(self, event, args, state, control, **kwargs)
    if event in _ASKED_AFTER and (parallel := parallel_state(self.model)):
        agree_on_control(control, parallel)
    return control
