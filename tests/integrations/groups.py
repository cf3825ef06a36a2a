"""Jobs: groups of tp ranks with batches of their own, against one process with all groups' batches.

Evaluation has the same ``per_device_eval_batch_size`` on both sides: a loss is the mean over rows
of the means of their batches.
"""

from __future__ import annotations

import numpy as np

from integrations.data import Rows, SizedStream, Stream, even_rows
from integrations.evaluation import metrics_of
from integrations.scene import clean, weights
from integrations.training import VARIANTS as ONE_GROUP

EVEN = {"train_dataset": even_rows(24)}
VARIANTS = {
    "five_steps": {"max_steps": 5, "include_num_input_tokens_seen": "non_padding"},
    # One length: no padding, which differs with the rows of a batch.
    "even": {**EVEN, "max_steps": 4, "include_num_input_tokens_seen": "all"},
    # The last batch of the second group: of one row, of none.
    "epochs": {"train": 11, "num_train_epochs": 2, "max_steps": -1},
    "short_epochs": {"train": 9, "num_train_epochs": 2, "max_steps": -1},
    "drop_last": {
        "train": 11,
        "num_train_epochs": 2,
        "max_steps": -1,
        "dataloader_drop_last": True,
    },
    "stream": {"train_dataset": Stream(even_rows(20))},
    "sized_stream": {"train_dataset": SizedStream(even_rows(14)), "num_train_epochs": 1}
    | {"max_steps": -1},
    "undispatched": {
        "train_dataset": SizedStream(Rows(12)),
        "accelerator_config": {"dispatch_batches": False},
    },
    **{
        name: ONE_GROUP[name]
        for name in ("by_length", "rebalance", "dispatch", "loss_func", "checkpointing")
    },
}
UNPADDED = ("even", "stream", "sized_stream", "dispatch")


def train(scene):
    """Histories of runs; of the first also the weights."""
    report = {}
    for name, options in VARIANTS.items():
        trainer = scene.trainer(name, **options)
        report[name] = scene.train(trainer)
        report[name]["batch_size"] = trainer.get_total_train_batch_size(trainer.args)
        if name not in UNPADDED:
            # Counted with the padding.
            del report[name]["total_flos"]
        if name == "five_steps":
            report[name]["whole"] = {
                n: float(w.abs().sum()) for n, w in weights(trainer.model).items()
            }
            report[name]["after"] = clean(trainer.evaluate())
    return report


def evaluate(scene):
    """Losses, metrics and predictions, before and without any training."""
    report = {}
    for rows in (7, 9, 8):
        trainer = scene.trainer("eval", evaluation=rows, compute_metrics=metrics_of)
        report[f"eval_{rows}"] = clean(trainer.evaluate())
        prediction = trainer.predict(Rows(rows, seed=8))
        report[f"predict_{rows}"] = {
            "rows": list(prediction.predictions.shape),
            "labels": prediction.label_ids.tolist(),
            "sum": float(np.abs(prediction.predictions[prediction.predictions != -100]).sum()),
            "metrics": clean(prediction.metrics),
        }
        trainer.compute_metrics = None
        report[f"loss_{rows}"] = clean(trainer.evaluate())
    trainer.args.eval_accumulation_steps = 2
    report["accumulated"] = clean(trainer.evaluate(Rows(7, seed=8)))
    report["stream"] = clean(trainer.evaluate(Stream(even_rows(7, seed=8))))
    trainer = scene.trainer("eval3", label_smoothing_factor=0.1, eval_use_gather_object=True)
    report["smoothed"] = clean(trainer.evaluate())
    trainer = scene.trainer(
        "eval4",
        compute_metrics=metrics_of,
        accelerator_config={"dispatch_batches": True},
        eval_dataset=even_rows(7, seed=8),
    )
    report["dispatched"] = clean(trainer.evaluate())
    return report
