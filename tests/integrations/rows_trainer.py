"""What goes wrong without each patch of Trainer's data, counters and evaluation."""

from __future__ import annotations

import torch

from integrations.data import collate, even_rows, noisy_collate
from integrations.refusals import others
from integrations.rows import Raises, row
from integrations.scene import logits_made


def _step(scene, **options):
    """One optimizer step of four rows of six tokens."""
    options = {"train_dataset": even_rows(8, masked=False), "max_steps": 1, **options}
    trainer = scene.trainer("probe", **options)
    trainer.train()
    return trainer


# The plain Trainer is given the mesh of ours, and the rows of one rank to all. Ours does not train
# then: its batches are cut over the ranks, which is refused.
@row("Trainer.create_accelerator_and_postprocess", right=[None, 2], wrong=[2, 2])
def mesh_of_the_model(scene):
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


# Orders of the two ranks, and micro-batches of an epoch for one.
@row("Trainer._get_train_sampler", right=[1, 10], wrong=[2, 6])
def batches_of_batch_rebalance(scene):
    trainer = scene.trainer("probe", train_sampling_strategy="batch_rebalance")
    batches = list(trainer._get_train_sampler())
    return [len({str(one) for one in scene.everywhere(batches)}), len(batches)]


@row("Trainer._get_dataloader", right=1, wrong=2)
def batches_of_random_workers(scene):
    options = {"dataloader_num_workers": 1, "collator": noisy_collate}
    trainer = scene.trainer("probe", train_dataset=even_rows(4), **options)
    batches = [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]
    return len({str(one) for one in scene.everywhere(batches)})


@row("Trainer._get_num_items_in_batch", right=1.0, wrong=2.0)
def loss_of_local_counts(scene):
    first, second = (
        _step(scene, average_tokens_across_devices=there).state.log_history[0]["loss"]
        for there in (False, True)
    )
    return first / second


@row("Trainer._track_num_input_tokens", right=24, wrong=48)
def tokens_seen(scene):
    return _step(scene, include_num_input_tokens_seen="all").state.num_input_tokens_seen


@row("Trainer.store_flos", right=1.0, wrong=2.0)
def flos(scene):
    """Those of a step of two micro-batches, of those of a Trainer over the unsharded model."""
    plain = scene.trainer("probe", scene.tiny(parallel=False))
    alone = plain.floating_point_ops(collate([even_rows(2)[i] for i in range(2)]))
    return _step(scene).state.total_flos / (2 * alone)


# Seven rows in batches of two.
@row("Trainer.prediction_step", right=0, wrong=4)
def whole_logits_of_a_loss(scene):
    with logits_made() as made:
        scene.trainer("probe").evaluate()
    return len(made)


@row("Trainer.evaluation_loop", right=[0.0, 0.0], wrong=[0.0, 1.0])
def metrics_of_the_ranks(scene):
    def compute(prediction):
        return {"rank": float(scene.rank)}

    found = scene.trainer("probe", compute_metrics=compute).evaluate()
    return scene.everywhere(found["eval_rank"])


@row("Trainer.log", right=4, wrong=2)
def steps_of_evaluation(scene):
    found = scene.trainer("probe").evaluate()
    return round(found["eval_steps_per_second"] * found["eval_runtime"])


@row("Trainer.predict", right=4, wrong=2)
def steps_of_prediction(scene):
    trainer = scene.trainer("probe")
    found = trainer.predict(trainer.eval_dataset).metrics
    return round(found["test_steps_per_second"] * found["test_runtime"])
