"""Jobs: evaluation and prediction, the same in every mode."""

from __future__ import annotations

import numpy as np
import torch

from integrations.data import Rows, Stream, even_rows
from integrations.scene import clean, logits_made


def metrics_of(prediction):
    logits, labels = prediction.predictions, np.asarray(prediction.label_ids)
    if isinstance(logits, tuple):
        logits = logits[0]
    logits = np.asarray(logits)
    hit = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
    return {"accuracy": float(hit.mean()), "rows": len(labels), "sum": float(np.abs(logits).sum())}


def _with_inputs(prediction):
    rows = prediction.inputs.shape[0]
    return {**metrics_of(prediction), "inputs": rows, "losses": len(prediction.losses)}


def _batch_metrics():
    seen = {"rows": 0, "hit": 0.0}

    def compute(prediction, compute_result=False):
        found = metrics_of(prediction)
        seen["rows"] += found["rows"]
        seen["hit"] += found["accuracy"]
        return dict(seen) if compute_result else {}

    return compute


def evaluate(scene):
    trainer = scene.trainer("eval", compute_metrics=metrics_of)
    # Before any training: the accelerator prepares the model for evaluation alone.
    report = {"eval_first": clean(trainer.evaluate())}
    prediction = trainer.predict(Rows(7, seed=8))
    report["predict"] = {
        "rows": list(prediction.predictions.shape),
        "labels": prediction.label_ids.tolist(),
        "sum": float(np.abs(prediction.predictions[prediction.predictions != -100]).sum()),
        "metrics": clean(prediction.metrics),
    }
    trainer.compute_metrics = None
    report["eval_loss_only"] = clean(trainer.evaluate())
    trainer.compute_metrics = metrics_of
    trainer.args.eval_accumulation_steps = 2
    report["eval_accumulated"] = clean(trainer.evaluate())
    report["eval_stream"] = clean(trainer.evaluate(Stream(Rows(7, seed=8))))
    trainer.args.include_for_metrics = ["inputs", "loss"]
    trainer.compute_metrics = _with_inputs
    report["eval_inputs"] = clean(trainer.evaluate())
    trainer = scene.trainer(
        "eval2",
        compute_metrics=_batch_metrics(),
        batch_eval_metrics=True,
        per_device_eval_batch_size=3,
        average_tokens_across_devices=False,
    )
    report["eval_batched"] = clean(trainer.evaluate())
    more = smoothed_and_dispatched(scene, metrics_of)
    report |= {f"eval_{name}": metrics for name, metrics in more.items()}
    trainer = scene.trainer("full_eval", scene.tiny(dtype=torch.float32), bf16_full_eval=True)
    report["full_eval"] = clean(trainer.evaluate())
    return report


def smoothed_and_dispatched(scene, metrics):
    """With label smoothing and objects gathered; and with batches that one rank deals out."""
    trainer = scene.trainer("eval3", label_smoothing_factor=0.1, eval_use_gather_object=True)
    report = {"smoothed": clean(trainer.evaluate())}
    trainer = scene.trainer(
        "eval4",
        compute_metrics=metrics,
        accelerator_config={"dispatch_batches": True},
        eval_dataset=even_rows(7, seed=8),
    )
    return {**report, "dispatched": clean(trainer.evaluate())}


def best(scene):
    trainer = scene.trainer(
        "best",
        learning_rate=0.05,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        compute_metrics=metrics_of,
    )
    trainer.train()
    folder = scene.out / scene.mode / "best"
    return {
        "best": {
            "steps": trainer.state.best_global_step,
            "metric": trainer.state.best_metric,
            "after": clean(trainer.evaluate()),
            "left": sorted(p.name for p in folder.iterdir() if p.is_dir()),
        }
    }


def whole_logits(scene):
    """How often logits of the whole vocabulary are made: when somebody reads them."""
    trainer = scene.trainer("lazy")
    with logits_made() as loss_only:
        trainer.evaluate()
    trainer.compute_metrics = metrics_of
    with logits_made() as metrics:
        trainer.evaluate()
    low = scene.trainer("lazy", scene.tiny(dtype=torch.float32), bf16=True, max_steps=1)
    with logits_made() as bf16_training:
        low.train()
    return {
        "loss_only": len(loss_only),
        "metrics": len(metrics),
        "bf16_training": len(bf16_training),
    }
