"""What goes wrong without each patch of Trainer's data, counters and evaluation."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from hf_sp import parallel_state
from integrations.data import collate, even_rows
from integrations.refusals import others
from integrations.rows import Raises, row
from integrations.scene import logits_made


def _step(scene, **options):
    """One optimizer step of four rows of six tokens."""
    options = {"train_dataset": even_rows(8, masked=False), "max_steps": 1, **options}
    trainer = scene.trainer("probe", **options)
    trainer.train()
    return trainer


# Processes that a Trainer over a plain model sees, and the next one of ours, which would train each
# rank on rows of its own.
@row("Trainer.create_accelerator_and_postprocess", right=[2, 1], wrong=[2, 2])
def processes_of_the_model(scene):
    return others(scene, train=False)


# Eight rows in batches of two, for every rank.
@row("Trainer.call_model_init", right=4, wrong=2)
def batches_with_model_init(scene):
    made = {"model_init": lambda: scene.tiny(rank_seeds=False)}
    trainer = scene.trainer("probe", train_dataset=even_rows(8), **made)
    return len(trainer.get_train_dataloader())


@row(
    "Trainer._validate_args",
    right=Raises("ConfigError", "the optimizer was not made from the parallelized model"),
    wrong="taken",
)
def optimizer_of_dead_parameters(scene):
    dead = torch.optim.AdamW(scene.tiny(parallel=False).parameters())
    scene.trainer("probe", optimizers=(dead, None))
    return "taken"


# Onto a GPU, from where FSDP's policy keeps it.
@row("Trainer._move_model_to_device", right=[], wrong=["cpu:0"])
def moves_of_what_is_offloaded(scene):
    model, moves = scene.tiny(), []
    parallel_state(model).offload_policy = CPUOffloadPolicy()
    with mock.patch.object(model, "to", lambda device: moves.append(str(device)) or model):
        _step(scene, model=model)
    return moves


@row("Trainer.store_flos", right=1.0, wrong=2.0)
def flos(scene):
    """Those of a step of two micro-batches, of those of a Trainer over the unsharded model."""
    plain = scene.trainer("probe", scene.tiny(parallel=False))
    alone = plain.floating_point_ops(collate([even_rows(2)[i] for i in range(2)]))
    return _step(scene).state.total_flos / (2 * alone)


# Seven rows in batches of two; and, over two groups, the losses of a last batch's three rows.
@row("Trainer.prediction_step", right=[0, 1], wrong=[4, 2])
def whole_logits_of_a_loss(scene):
    with logits_made() as made:
        scene.trainer("probe").evaluate()
    trainer = replace(scene, groups=2).trainer("probe")
    seen, gather = [], trainer.gather_function
    trainer.gather_function = lambda x, **k: seen.append(gather(x, **k)) or seen[-1]
    trainer.evaluate()
    return [len(made), len(set(seen[-1].tolist()))]


# Labelled tokens of an epoch of three rows, over two groups.
@row("Trainer.get_batch_samples", right=15, wrong=20)
def tokens_of_an_epoch(scene):
    rows = even_rows(3, masked=False)
    trainer = replace(scene, groups=2).trainer("probe", train_dataset=rows)
    batches = iter(trainer.get_train_dataloader())
    return float(trainer.get_batch_samples(batches, 1, torch.device("cpu"))[1])


# Rows that are sorted by their length together: of two micro-batches of two groups.
@row("Trainer._get_train_sampler", right=8, wrong=4)
def batch_of_the_length_sampler(scene):
    options = {"train_sampling_strategy": "group_by_length"}
    return replace(scene, groups=2).trainer("probe", **options)._get_train_sampler().batch_size


@row("Trainer.evaluation_loop", right=[0.0, 0.0], wrong=[0.0, 1.0])
def metrics_of_the_ranks(scene):
    def compute(prediction):
        return {"rank": float(scene.rank)}

    found = scene.trainer("probe", compute_metrics=compute).evaluate()
    return scene.everywhere(found["eval_rank"])
