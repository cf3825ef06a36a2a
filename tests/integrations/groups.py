"""Jobs: groups of tp ranks with batches of their own; one process has the batches of all groups."""

from __future__ import annotations

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from integrations.data import Rows, SizedStream, Stream, even_rows
from integrations.scene import checksum, clean, history, same, weights
from integrations.training import VARIANTS as ONE_GROUP

LINEARS = ("q_proj", "o_proj", "down_proj")
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


def _metrics_of(prediction):
    """Of labelled tokens: how far a batch is padded is another matter in each group."""
    logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    known = labels != -100
    hit = (logits.argmax(-1) == labels)[known]
    total = float(np.abs(logits[known]).sum())
    return {"accuracy": float(hit.mean()), "rows": len(labels), "sum": total}


def train(scene):
    """Histories of runs, and an evaluation after one."""
    report = {}
    for name, options in VARIANTS.items():
        trainer = scene.trainer(name, **options)
        report[name] = scene.train(trainer)
        report[name]["batch_size"] = trainer.get_total_train_batch_size(trainer.args)
        if name not in UNPADDED:
            # Counted with the padding.
            del report[name]["total_flos"]
        if name == "five_steps":
            report[name]["after"] = clean(trainer.evaluate())
    return report


def evaluate(scene):
    """Losses, metrics and predictions, before and without any training."""
    report = {}
    for rows in (7, 9, 8):
        trainer = scene.trainer("eval", evaluation=rows, compute_metrics=_metrics_of)
        report[f"eval_{rows}"] = clean(trainer.evaluate())
        prediction = trainer.predict(Rows(rows, seed=8))
        report[f"predict_{rows}"] = {
            "rows": list(prediction.predictions.shape),
            "labels": prediction.label_ids.tolist(),
            "metrics": clean(prediction.metrics),
        }
        trainer.compute_metrics = None
        report[f"loss_{rows}"] = clean(trainer.evaluate())
    trainer.args.eval_accumulation_steps = 2
    report["accumulated"] = clean(trainer.evaluate(Rows(7, seed=8)))
    report["eval_stream"] = clean(trainer.evaluate(Stream(even_rows(7, seed=8))))
    trainer = scene.trainer("eval3", label_smoothing_factor=0.1, eval_use_gather_object=True)
    report["smoothed"] = clean(trainer.evaluate())
    trainer = scene.trainer(
        "eval4",
        compute_metrics=_metrics_of,
        accelerator_config={"dispatch_batches": True},
        eval_dataset=even_rows(7, seed=8),
    )
    report["dispatched"] = clean(trainer.evaluate())
    return report


def resume(scene):
    """Five steps that evaluate and save, the best kept; and again from the middle of an epoch."""
    options = {
        "train": 24,
        "max_steps": 4,
        "learning_rate": 0.05,
        "compute_metrics": _metrics_of,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }
    trainer = scene.trainer("best", **options)
    report = {"best": scene.train(trainer)}
    folder = scene.out / scene.mode / "best"
    report["best"] |= {
        "losses": [r["eval_loss"] for r in trainer.state.log_history if "eval_loss" in r],
        "step": trainer.state.best_global_step,
        "after": clean(trainer.evaluate()),
        "left": sorted(p.name for p in folder.iterdir() if p.is_dir()),
    }
    saved = scene.trainer("resume", train=24, max_steps=5, save_strategy="steps", save_steps=2)
    report["saved"] = scene.train(saved)
    for run in report.values():
        # Counted with the padding.
        del run["total_flos"]
    again = scene.trainer("resume", scene.tiny(seed=5), train=24, max_steps=5)
    again.train(resume_from_checkpoint=str(scene.out / scene.mode / "resume" / "checkpoint-2"))
    report["resumed"] = {
        "history": history(again),
        "weights_equal": same(weights(again.model), weights(saved.model)),
    }
    return report


def adapted(scene, order, seed=0):
    """A model with adapters, which come before ``parallelize`` or after it."""
    model = scene.tiny(seed, parallel=order == "after")
    torch.manual_seed(seed + 5)
    config = LoraConfig(r=3, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    if order == "before" and not scene.plain:
        from hf_sp import parallelize

        model = parallelize(model, **scene.degrees)
    return model


def lora(scene):
    """Five steps on factors, an evaluation, and a resume in the middle of an epoch."""
    report = {}
    for order in ("before", "after"):
        options = {"train": 24, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
        trainer = scene.trainer(f"lora-{order}", adapted(scene, order), **options)
        report[f"lora_{order}"] = scene.train(trainer)
        del report[f"lora_{order}"]["total_flos"]
        folder = scene.out / scene.mode / f"lora-{order}" / "checkpoint-2"
        again = scene.trainer(f"lora-{order}", adapted(scene, order, seed=0), **options)
        again.train(resume_from_checkpoint=str(folder))
        report[f"lora_{order}"] |= {
            "evaluation": clean(trainer.evaluate()),
            "resumed": history(again),
            "weights_equal": same(weights(again.model), weights(trainer.model)),
            "saved": checksum(load_file(folder / "adapter_model.safetensors")),
        }
    return report


def cross(scene, sources):
    """Resumed from runs of other degrees: one process, or other groups."""
    rows, report = 4 // scene.groups, {}
    for source in sources:
        options = {"train": 24, "max_steps": 5, "per_device_train_batch_size": rows}
        trainer = scene.trainer("cross", scene.tiny(seed=6), **options)
        trainer.train(resume_from_checkpoint=str(scene.out / source / "resume" / "checkpoint-2"))
        report[source] = {
            "history": history(trainer),
            "weights": checksum(weights(trainer.model)),
        }
    return report
