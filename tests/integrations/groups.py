"""Jobs: groups of tp ranks with batches of their own; one process has the batches of all groups."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from small import sizes
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import MixtralConfig, MixtralForCausalLM

from integrations.accelerate_loop import train_on
from integrations.data import Rows, SizedStream, Stream, collate, even_rows
from integrations.evaluation import smoothed_and_dispatched
from integrations.scene import (
    checksum,
    clean,
    history,
    reset_accelerate,
    same,
    weights,
)
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
    return report | smoothed_and_dispatched(scene, _metrics_of)


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
    saved = scene.trainer("resume", train=21, max_steps=5, save_strategy="steps", save_steps=2)
    report["saved"] = scene.train(saved)
    for run in report.values():
        # Counted with the padding.
        del run["total_flos"]
    again = scene.trainer("resume", scene.tiny(seed=5), train=21, max_steps=5)
    again.train(resume_from_checkpoint=str(scene.out / scene.mode / "resume" / "checkpoint-2"))
    report["resumed"] = {
        "history": history(again),
        "weights_equal": same(weights(again.model), weights(saved.model)),
    }
    options = {**EVEN, "max_steps": 5, "accelerator_config": {"dispatch_batches": True}}
    options |= {"save_strategy": "steps", "save_steps": 2}
    report["dispatched_run"] = scene.train(scene.trainer("dispatched", **options))
    again = scene.trainer("dispatched", scene.tiny(seed=5), **options)
    again.train(resume_from_checkpoint=str(scene.out / scene.mode / "dispatched" / "checkpoint-2"))
    report["dispatched_run"]["resumed"] = history(again)
    return report


def long(scene):
    """Checkpointed layers whose inputs wait on the host, MLPs in tiles; and a resume."""
    options = {"train": 21, "max_steps": 5, "gradient_checkpointing": True}
    options |= {"save_strategy": "steps", "save_steps": 2}
    switches = {"offload": True, "mlp_tile": 2}
    trainer = scene.trainer("long", scene.tiny(**switches), **options)
    report = scene.train(trainer)
    del report["total_flos"]  # counted with the padding
    again = scene.trainer("long", scene.tiny(seed=5, **switches), **options)
    again.train(resume_from_checkpoint=str(scene.out / scene.mode / "long" / "checkpoint-2"))
    report["resumed"] = history(again) == report["history"]
    report["weights_equal"] = same(weights(again.model), weights(trainer.model))
    return {"long": report}


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
        options = {"train": 21, "max_steps": 5, "save_strategy": "steps", "save_steps": 2}
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
        options = {"train": 21, "max_steps": 5, "per_device_train_batch_size": rows}
        trainer = scene.trainer("cross", scene.tiny(seed=6), **options)
        trainer.train(resume_from_checkpoint=str(scene.out / source / "resume" / "checkpoint-2"))
        report[source] = {
            "history": history(trainer),
            "weights": checksum(weights(trainer.model)),
        }
    return report


def experts(scene):
    """Sparse models, whose experts are split by features, or over all ranks."""
    report = {}
    for ep in (1, 4):
        options = {"train": 24, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = scene.trainer(f"experts-{ep}", _sparse(scene, ep), **options)
        report[f"experts_{ep}"] = scene.train(trainer)
        del report[f"experts_{ep}"]["total_flos"]
        report[f"experts_{ep}"]["evaluation"] = clean(trainer.evaluate())
        if scene.plain:
            continue  # stock Trainer loses the experts of its own checkpoints
        folder = scene.out / scene.mode / f"experts-{ep}" / "checkpoint-2"
        again = scene.trainer(f"experts-{ep}", _sparse(scene, ep, seed=5), **options)
        again.train(resume_from_checkpoint=str(folder))
        report[f"resumed_{ep}"] = {
            "history": history(again) == report[f"experts_{ep}"]["history"],
            "weights_equal": same(weights(again.model), weights(trainer.model)),
        }
    return report


def _sparse(scene, ep, seed=0):
    torch.manual_seed(seed)
    config = MixtralConfig(**sizes(num_local_experts=4, max_position_embeddings=32))
    model = MixtralForCausalLM(config).double()
    # The grouped products know no float64.
    model.set_experts_implementation("eager")
    if scene.plain:
        return model
    from hf_sp import parallelize

    return parallelize(model, ep=ep, **scene.degrees)


def policies(scene):
    """Computed in float32 over weights in float64, and offloaded; saved, resumed, evaluated."""
    report = {}
    for name in ("mp_policy", "offload_policy"):
        options = {"train": 24, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        given = {} if scene.plain else {name: _policy(name)}
        trainer = scene.trainer(f"policy-{name}", scene.tiny(**given), **options)
        report[name] = scene.train(trainer)
        del report[name]["total_flos"]
        report[name]["evaluation"] = clean(trainer.evaluate())
        folder = scene.out / scene.mode / f"policy-{name}" / "checkpoint-2"
        again = scene.trainer(f"policy-{name}", scene.tiny(seed=5, **given), **options)
        again.train(resume_from_checkpoint=str(folder))
        report[name] |= {
            "resumed": history(again),
            "weights_equal": same(weights(again.model), weights(trainer.model)),
            "dtypes": sorted({str(p.dtype) for p in trainer.model.parameters()}),
        }
    return report


def _policy(name):
    if name == "offload_policy":
        return CPUOffloadPolicy(pin_memory=False)
    return MixedPrecisionPolicy(torch.float32, torch.float64, output_dtype=torch.float64)


def faults(scene):
    """Two steps with gradients that are the groups' mean, that of a mean, and their sum."""
    report = {}
    for name, divisor in {"mean": 2.0, "twice": 4.0, "never": 1.0}.items():
        trainer = scene.trainer("faults", max_steps=2, max_grad_norm=1e6)
        for module in () if scene.plain else trainer.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(divisor)
        report[name] = scene.train(trainer)["history"]
    return {"faults": report}


def loop(scene):
    """accelerate without a Trainer: accumulation, clipping, an evaluation, a file."""
    reset_accelerate()
    # One order in any number of processes.
    loading = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3)
    accelerator = Accelerator(gradient_accumulation_steps=2, dataloader_config=loading)
    model = scene.tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(77 + scene.rank)
    size = 2 * (scene.groups if scene.plain else 1)
    # A loss is a mean of each group's own: of as many tokens.
    rows, others = even_rows(16, masked=False), even_rows(7, seed=8, masked=False)
    train = DataLoader(rows, batch_size=size, shuffle=True, collate_fn=collate)
    test = DataLoader(others, batch_size=size, collate_fn=collate)
    train, test, model, optimizer = accelerator.prepare(train, test, model, optimizer)
    losses, norms, predicted = [], [], []
    for _ in range(2):
        for batch in train:
            loss = train_on(accelerator, model, optimizer, batch, norms)
            losses.append(float(accelerator.gather(loss.detach()).mean()))
            total = accelerator.reduce(torch.tensor(len(batch["input_ids"])))
            assert int(total) == 2 * scene.groups
    model.eval()
    for batch in test:
        with torch.no_grad():
            out = model(**batch).logits.argmax(-1)[:, -1]
        predicted += accelerator.gather_for_metrics(out).tolist()
    return {
        "loop": {
            "losses": losses,
            "norms": norms,
            "predicted": predicted,
            "steps": [len(train), len(test)],
            "weights": checksum(weights(model)),
        }
    }
