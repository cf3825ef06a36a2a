"""The script that the integration tests start: plain, or on several ranks. Reports JSON.

``python worker.py plain OUT`` trains the unmodified model in one process; ``torchrun ... worker.py
tp OUT`` runs the same code with the one line added. What differs between the two reports is what
the integration got wrong.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch.utils.data import Dataset, IterableDataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

MODE = sys.argv[1]
OUT = Path(sys.argv[2])
RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
REPORT: dict = {}

if MODE != "plain":
    from hf_sp import parallelize
    from hf_sp.errors import HfSpError


def tiny(
    seed=0, *, vocab=61, tie=False, dropout=0.0, parallel=True, dtype=torch.float64, rank_seeds=True
):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
        attention_dropout=dropout,
        attn_implementation="eager" if dropout else "sdpa",
    )
    model = LlamaForCausalLM(config).to(dtype)
    # Weights of a size at which gradients are clipped and losses differ between batches.
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)
    if MODE != "plain" and parallel:
        if rank_seeds:
            # Ranks must not agree by accident.
            torch.manual_seed(1000 + RANK)
        model = parallelize(model, tp=WORLD)
    return model


class Rows(Dataset):
    """Rows of 3 to 9 tokens; the first labels are masked, as in completion-only training."""

    def __init__(self, n, seed=7, vocab=61):
        g = torch.Generator().manual_seed(seed)
        self.rows = []
        for i in range(n):
            ids = torch.randint(0, vocab, (3 + (5 * i) % 7,), generator=g)
            labels = ids.clone()
            labels[: i % 3] = -100
            self.rows.append({"input_ids": ids, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class Stream(IterableDataset):
    def __init__(self, rows, sized=False):
        self.rows = rows
        if sized:
            self.__class__ = SizedStream

    def __iter__(self):
        return iter(self.rows.rows)


class SizedStream(Stream):
    def __len__(self):
        return len(self.rows)


def collate(rows):
    length = max(len(r["input_ids"]) for r in rows)

    def pad(x, value):
        return torch.cat([x, x.new_full((length - len(x),), value)])

    return {
        "input_ids": torch.stack([pad(r["input_ids"], 0) for r in rows]),
        "labels": torch.stack([pad(r["labels"], -100) for r in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(r["input_ids"]), 0) for r in rows]),
    }


def noisy_collate(rows):
    """A collator that draws at random, as masking and augmentation do."""
    batch = collate(rows)
    swap = torch.rand(batch["input_ids"].shape) < 0.3
    batch["input_ids"] = torch.where(
        swap, torch.full_like(batch["input_ids"], 5), batch["input_ids"]
    )
    return batch


class Recorder(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def arguments(name, **kwargs):
    options = {
        "output_dir": str(OUT / MODE / name),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "max_steps": 2 if name.startswith("v") else 4,
        "lr_scheduler_type": "linear",
        "save_strategy": "no",
        "seed": 3,
        "dataloader_pin_memory": False,
        **kwargs,
    }
    return TrainingArguments(**options)


def metrics_of(prediction):
    logits, labels = prediction.predictions, np.asarray(prediction.label_ids)
    if isinstance(logits, tuple):
        logits = logits[0]
    logits = np.asarray(logits)
    hit = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
    return {"accuracy": float(hit.mean()), "rows": len(labels), "sum": float(np.abs(logits).sum())}


def trainer_for(
    name, model=None, *, train=20, evaluation=7, kind=Trainer, collator=collate, **kwargs
):
    own = {
        k: kwargs.pop(k)
        for k in ("compute_metrics", "callbacks", "optimizers", "compute_loss_func", "model_init")
        if k in kwargs
    }
    train_dataset = kwargs.pop("train_dataset", None) or Rows(train)
    eval_dataset = kwargs.pop("eval_dataset", None) or Rows(evaluation, seed=8)
    if "model_init" not in own and model is None:
        model = tiny()
    trainer = kind(
        model=model,
        args=arguments(name, **kwargs),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        **own,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def history(trainer):
    keys = ("loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen", "step")
    return [{k: r[k] for k in keys if k in r} for r in trainer.state.log_history if "loss" in r]


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def weights(model):
    return {n: full(p.detach()).clone() for n, p in model.named_parameters()}


def checksum(tensors):
    # Sums without cancellation, so that they can be compared by their relative error.
    return {
        n: [float(t.double().abs().sum()), float(t.double().square().sum())]
        for n, t in tensors.items()
    }


def same(a, b):
    return sorted(a) == sorted(b) and all(torch.equal(a[k], b[k]) for k in a)


def run(name, trainer, **kwargs):
    result = trainer.train(**kwargs)
    REPORT[name] = {
        "history": history(trainer),
        "train_loss": result.training_loss,
        "total_flos": trainer.state.total_flos,
        "max_steps": trainer.state.max_steps,
        "weights": checksum(weights(trainer.model)),
    }
    return trainer


# --- jobs of both modes: the same code, the same numbers ----------------------------------------


def job_train():
    trainer = run("train", trainer_for("train", include_num_input_tokens_seen="all"))
    REPORT["train"]["batch_size"] = trainer.get_total_train_batch_size(trainer.args)
    whole = weights(trainer.model)
    if RANK == 0:
        torch.save(whole, OUT / f"{MODE}-weights.pt")


def job_variants():
    run("tokens_local", trainer_for("v1", average_tokens_across_devices=False))
    run("no_clipping", trainer_for("v2", max_grad_norm=0.0, gradient_accumulation_steps=3))
    run("label_smoothing", trainer_for("v3", label_smoothing_factor=0.1))
    run("neftune", trainer_for("v4", neftune_noise_alpha=5.0, max_steps=2))
    run("epochs", trainer_for("v5", train=11, num_train_epochs=2, max_steps=-1))
    run("by_length", trainer_for("v6", train_sampling_strategy="group_by_length"))
    run("rebalance", trainer_for("v7", train_sampling_strategy="batch_rebalance"))
    run("stream", trainer_for("v8", train_dataset=Stream(Rows(20))))
    run(
        "sized_stream",
        trainer_for(
            "v9", train_dataset=Stream(Rows(10), sized=True), num_train_epochs=1, max_steps=-1
        ),
    )
    run(
        "dispatch",
        trainer_for(
            "v10",
            train_dataset=even_rows_of(12),
            num_train_epochs=1,
            max_steps=-1,
            accelerator_config={"dispatch_batches": True},
        ),
    )
    run("noisy", trainer_for("v11", collator=noisy_collate))
    run(
        "workers", trainer_for("v12", collator=noisy_collate, dataloader_num_workers=2, max_steps=2)
    )
    run("plain_sampler", trainer_for("v13", accelerator_config={"use_seedable_sampler": False}))

    def summed(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return loss / num_items_in_batch

    run("loss_func", trainer_for("v14", compute_loss_func=summed))
    run("tied", trainer_for("v15", tiny(tie=True)))
    run("checkpointing", trainer_for("v16", gradient_checkpointing=True))
    run("sgd", trainer_for("v17", optim="sgd"))
    run("fused", trainer_for("v18", optim="adamw_torch_fused"))
    run("model_init", trainer_for("v19", model_init=lambda: tiny(rank_seeds=False)))
    run("bf16", trainer_for("v20", tiny(dtype=torch.float32), bf16=True, max_steps=2))


def job_eval():
    trainer = trainer_for("eval", compute_metrics=metrics_of)
    # Before any training: the accelerator prepares the model for evaluation alone.
    REPORT["eval_first"] = clean(trainer.evaluate())
    prediction = trainer.predict(Rows(7, seed=8))
    REPORT["predict"] = {
        "rows": list(prediction.predictions.shape),
        "labels": prediction.label_ids.tolist(),
        "sum": float(np.abs(prediction.predictions[prediction.predictions != -100]).sum()),
        "metrics": clean(prediction.metrics),
    }
    trainer.compute_metrics = None
    REPORT["eval_loss_only"] = clean(trainer.evaluate())
    trainer.compute_metrics = metrics_of
    trainer.args.eval_accumulation_steps = 2
    REPORT["eval_accumulated"] = clean(trainer.evaluate())
    REPORT["eval_stream"] = clean(trainer.evaluate(Stream(Rows(7, seed=8))))
    trainer.args.include_for_metrics = ["inputs", "loss"]

    def with_inputs(prediction):
        rows = prediction.inputs.shape[0]
        return {**metrics_of(prediction), "inputs": rows, "losses": len(prediction.losses)}

    trainer.compute_metrics = with_inputs
    REPORT["eval_inputs"] = clean(trainer.evaluate())
    trainer = trainer_for(
        "eval2",
        compute_metrics=batch_metrics(),
        batch_eval_metrics=True,
        per_device_eval_batch_size=3,
        average_tokens_across_devices=False,
    )
    REPORT["eval_batched"] = clean(trainer.evaluate())
    trainer = trainer_for("eval3", label_smoothing_factor=0.1, eval_use_gather_object=True)
    REPORT["eval_smoothed"] = clean(trainer.evaluate())
    trainer = trainer_for(
        "eval4",
        compute_metrics=metrics_of,
        accelerator_config={"dispatch_batches": True},
        eval_dataset=even_rows_of(7, seed=8),
    )
    REPORT["eval_dispatched"] = clean(trainer.evaluate())


def even_rows_of(n, seed=7):
    """Rows of one length: dispatched batches of different shapes cannot be concatenated."""
    rows = Rows(n, seed=seed)
    for row in rows.rows:
        for k in row:
            row[k] = row[k].repeat(3)[:6]
    return rows


def batch_metrics():
    seen = {"rows": 0, "hit": 0.0}

    def compute(prediction, compute_result=False):
        found = metrics_of(prediction)
        seen["rows"] += found["rows"]
        seen["hit"] += found["accuracy"]
        return dict(seen) if compute_result else {}

    return compute


def clean(metrics):
    drop = ("runtime", "per_second", "preparation")
    return {k: v for k, v in metrics.items() if not any(d in k for d in drop)}


def job_resume():
    trainer = run("saved", trainer_for("resume", save_strategy="steps", save_steps=2))
    assert trainer.state.global_step == 4
    again = trainer_for("resume", tiny(seed=5))
    again.train(resume_from_checkpoint=str(OUT / MODE / "resume" / "checkpoint-2"))
    REPORT["resumed"] = {
        "history": history(again),
        "weights_equal": same(weights(again.model), weights(trainer.model)),
    }


def job_best():
    best = trainer_for(
        "best",
        learning_rate=0.05,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        compute_metrics=metrics_of,
    )
    best.train()
    REPORT["best"] = {
        "steps": best.state.best_global_step,
        "metric": best.state.best_metric,
        "after": clean(best.evaluate()),
        "left": sorted(p.name for p in (OUT / MODE / "best").iterdir() if p.is_dir()),
    }


# --- jobs of the parallel mode ------------------------------------------------------------------


def logits_of(model):
    ids = torch.arange(12).reshape(2, 6)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def job_save():
    for name, options in {"whole": {}, "sharded": {"max_shard_size": "3KB"}, "tied": {}}.items():
        model = tiny(tie=name == "tied", dtype=torch.float32)
        folder = OUT / f"{MODE}{WORLD}-{name}"
        model.save_pretrained(folder, **options)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        REPORT[f"save_{name}"] = {
            "equal": same(weights(model), dict(plain.named_parameters())),
            "config": "distributed_config" in (folder / "config.json").read_text(),
            "files": len(list(folder.glob("*.safetensors"))),
            "tied": plain.lm_head.weight is plain.model.embed_tokens.weight,
            "logits": float((logits_of(model) - logits_of(plain)).abs().max()),
        }
        other = tiny(seed=9, tie=name == "tied", dtype=torch.float32)
        if name == "sharded":
            from transformers.trainer_utils import load_sharded_checkpoint

            load_sharded_checkpoint(other, str(folder))
        else:
            other.load_state_dict(plain.state_dict())
        REPORT[f"save_{name}"]["loaded"] = same(weights(other), weights(model))
    model = tiny(dtype=torch.bfloat16)
    model.save_pretrained(OUT / f"{MODE}{WORLD}-bf16")
    plain = AutoModelForCausalLM.from_pretrained(OUT / f"{MODE}{WORLD}-bf16")
    REPORT["save_bf16"] = {
        "dtype": str(plain.dtype),
        "equal": same(weights(model), dict(plain.named_parameters())),
    }
    wrong = plain.state_dict()
    wrong["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4, dtype=torch.bfloat16)
    wrong["model.embed_tokens.weight"] = torch.zeros_like(wrong["model.embed_tokens.weight"])
    before = weights(model)
    REPORT["load_wrong"] = refused(lambda: model.load_state_dict(wrong))
    REPORT["load_wrong"]["untouched"] = same(before, weights(model))
    twin = copy.deepcopy(model)
    twin.load_state_dict({k: torch.zeros_like(v) for k, v in plain.state_dict().items()})
    REPORT["load_wrong"]["deepcopy"] = same(before, weights(model)) and not any(
        float(p.abs().sum()) for p in weights(twin).values()
    )


def refused(call):
    try:
        call()
    except HfSpError as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": None, "message": ""}


def job_optimizer():
    """State through DCP directly: uneven and empty shards, numbers, groups."""
    from torch import nn
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from hf_sp import parallel_state
    from hf_sp.checkpoint.optimizer import load_optimizer, save_optimizer

    mesh = parallel_state(tiny()).mesh

    def small():
        g = torch.Generator().manual_seed(1)
        model = nn.Module()
        for name, shape, placement in (
            ("uneven", (5, 3), Shard(0)),
            ("empty", (1, 3), Shard(0)),
            ("row", (2, 7), Shard(1)),
            ("norm", (4,), Replicate()),
        ):
            value = torch.randn(shape, generator=g)
            sharded = distribute_tensor(value, mesh, [placement], src_data_rank=None)
            model.register_parameter(name, nn.Parameter(sharded))
        return model

    def stepped(model, optimizer, n=2):
        for i in range(n):
            for p in model.parameters():
                p.grad = p.detach() * (i + 1)
            optimizer.step()
        return optimizer

    def build(model, kind):
        sharded = [model.uneven, model.empty, model.row]
        groups = [{"params": sharded, "weight_decay": 0.1}, {"params": [model.norm]}]
        return kind(groups)

    kinds = {
        "adamw": lambda g: torch.optim.AdamW(g, lr=0.1, betas=(0.8, 0.9)),
        "fused": lambda g: torch.optim.AdamW(g, lr=0.1, fused=True),
        "sgd": lambda g: torch.optim.SGD(g, lr=0.1),
        "momentum": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9),
        "amsgrad": lambda g: torch.optim.AdamW(
            g, lr=torch.tensor(0.1), amsgrad=True, foreach=False
        ),
    }
    for name, kind in kinds.items():
        model = small()
        optimizer = stepped(model, build(model, kind))
        folder = OUT / f"dcp-{name}"
        save_optimizer(model, optimizer, folder)
        other = small()
        other.load_state_dict(model.state_dict())
        fresh = build(other, kind)
        load_optimizer(other, fresh, folder)
        stepped(model, optimizer, 1)
        stepped(other, fresh, 1)
        REPORT[f"dcp_{name}"] = same(weights(model), weights(other))
    model = small()
    REPORT["dcp_misfit"] = refused(
        lambda: load_optimizer(model, torch.optim.AdamW([model.uneven]), OUT / "dcp-adamw")
    )
    model = small()
    odd = stepped(model, torch.optim.SGD(model.parameters(), lr=0.1))
    odd.state[model.row]["codes"] = torch.zeros(8, dtype=torch.uint8)
    REPORT["dcp_plain_state"] = refused(lambda: save_optimizer(model, odd, OUT / "dcp-odd"))


def job_cross():
    """Resume from a plain one-process run, and from a run at another degree."""
    import shutil

    reference = torch.load(OUT / "plain-weights.pt")
    for name, (source, degree) in {
        "stock": ("plain", 0),
        "tp1": ("one", 1),
        "tp2": ("tp", 2),
    }.items():
        folder = OUT / source / "resume" / "checkpoint-2"
        if degree == WORLD or not folder.exists():
            continue
        trainer = trainer_for("cross", tiny(seed=6))
        trainer.train(resume_from_checkpoint=str(folder))
        error = max(
            float((w - reference[n]).abs().max() / reference[n].abs().max())
            for n, w in weights(trainer.model).items()
        )
        REPORT[f"cross_{name}"] = {"error": error, "history": history(trainer)}
    tampered = OUT / f"tampered-{MODE}"
    if RANK == 0:
        shutil.copytree(OUT / "plain" / "resume" / "checkpoint-2", tampered)
        state = torch.load(tampered / "optimizer.pt")
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:-1]
        torch.save(state, tampered / "optimizer.pt")
    dist.barrier()
    trainer = trainer_for("cross", tiny(seed=6))
    REPORT["cross_tampered"] = refused(lambda: trainer.train(resume_from_checkpoint=str(tampered)))


def job_refusals():
    from accelerate import ParallelismConfig

    model = tiny()
    dead = torch.optim.AdamW(tiny(parallel=False).parameters())

    def make(**kwargs):
        return lambda: trainer_for("refused", model, **kwargs)

    REPORT["refusals"] = {
        "optimizer": refused(make(optimizers=(dead, None))),
        "liger": refused(make(use_liger_kernel=True)),
        "parallelism_config": refused(
            make(parallelism_config=ParallelismConfig(tp_size=1, dp_shard_size=WORLD))
        ),
        "sp_size": refused(make(parallelism_config=ParallelismConfig(tp_size=WORLD, sp_size=4))),
        "split_batches": refused(
            lambda: trainer_for(
                "refused",
                model,
                train_dataset=Stream(Rows(8)),
                accelerator_config={"split_batches": True},
            ).train()
        ),
    }
    for flag in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        arguments("warm")
        os.environ[flag] = "true"
        try:
            REPORT["refusals"][flag] = refused(
                lambda flag=flag: trainer_with(model, arguments_without_engine("refused", flag))
            )
        finally:
            del os.environ[flag]
    agreeing = trainer_for(
        "agreeing", tiny(), parallelism_config=ParallelismConfig(tp_size=WORLD), max_steps=1
    )
    agreeing.train()
    REPORT["refusals"]["agreeing"] = agreeing.state.global_step


def arguments_without_engine(name, flag):
    os.environ.pop(flag)
    made = arguments(name)
    made.world_size  # noqa: B018  (the distributed setup, before the flag is set again)
    os.environ[flag] = "true"
    return made


def trainer_with(model, args):
    return Trainer(model=model, args=args, train_dataset=Rows(4), data_collator=collate)


def job_accelerate():
    """The accelerate-only loop, ``Accelerator()`` knowing nothing."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 / (i + 1))
    torch.manual_seed(77 + (RANK if MODE != "plain" else 0))
    loader = torch.utils.data.DataLoader(Rows(11), batch_size=2, shuffle=True, collate_fn=collate)
    test = torch.utils.data.DataLoader(Rows(7, seed=8), batch_size=2, collate_fn=collate)
    loader, test, model, optimizer, schedule = accelerator.prepare(
        loader, test, model, optimizer, schedule
    )
    losses, norms, rates, first = [], [], [], []
    for _ in range(2):
        for batch in loader:
            first.append(batch["input_ids"].tolist())
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(full(accelerator.clip_grad_norm_(model.parameters(), 0.5))))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(float(loss))
            rates.append(schedule.get_last_lr()[0])
    model.eval()
    rows = []
    for batch in test:
        with torch.no_grad():
            out = model(**batch).logits.argmax(-1)[:, -1]
        rows += accelerator.gather_for_metrics(out).tolist()
    REPORT["accelerate"] = {
        "losses": losses,
        "norms": norms,
        "rates": rates,
        "first": first,
        "rows": len(rows),
        "predictions": rows,
        "wrapped": type(model).__name__,
    }
    folder = OUT / f"{MODE}{WORLD}-accelerate"
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        folder,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    accelerator.wait_for_everyone()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    REPORT["accelerate"]["saved"] = same(weights(unwrapped), dict(plain.named_parameters()))
    if MODE != "plain" and WORLD > 1:
        REPORT["accelerate"]["save_state"] = refused(lambda: accelerator.save_state(str(OUT / "s")))
        AcceleratorState._reset_state(True)
        late = Accelerator()
        late.prepare(torch.utils.data.DataLoader(Rows(4), collate_fn=collate))
        REPORT["accelerate"]["loader_first"] = refused(lambda: late.prepare(tiny()))
        AcceleratorState._reset_state(True)


def job_trainer_saves():
    """save_model by the user, save_only_model, no logits in a loss-only evaluation."""
    trainer = trainer_for(
        "user", max_steps=1, save_only_model=True, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model(str(OUT / f"user{WORLD}"))
    plain = AutoModelForCausalLM.from_pretrained(OUT / f"user{WORLD}", dtype=torch.float64)
    REPORT["save_model"] = {
        "equal": same(weights(trainer.model), dict(plain.named_parameters())),
        "files": sorted(p.name for p in (OUT / MODE / "user" / "checkpoint-1").iterdir()),
    }
    made = []
    from hf_sp.model.lazy import LazyLogits

    original = LazyLogits.materialize

    def counted(self):
        made.append(1)
        return original(self)

    LazyLogits.materialize = counted
    trainer.evaluate()
    loss_only = len(made)
    trainer.compute_metrics = metrics_of
    trainer.evaluate()
    bf16 = trainer_for("lazy", tiny(dtype=torch.float32), bf16=True, max_steps=1)
    before = len(made)
    bf16.train()
    LazyLogits.materialize = original
    REPORT["logits_made"] = {
        "loss_only": loss_only,
        "metrics": before - loss_only,
        "bf16_training": len(made) - before,
    }
    # Another Trainer over a plain model afterwards is not ours.
    if WORLD > 1:
        shared = arguments("shared", max_steps=1)
        Trainer(model=tiny(), args=shared, train_dataset=Rows(4), data_collator=collate).train()
        other = Trainer(
            model=tiny(parallel=False), args=shared, train_dataset=Rows(4), data_collator=collate
        )
        after = Trainer(model=tiny(), args=shared, train_dataset=Rows(4), data_collator=collate)
        REPORT["after_us"] = {
            "plain": other.accelerator.parallelism_config is None
            or other.accelerator.parallelism_config is after.accelerator.parallelism_config,
            "ours": after.accelerator.parallelism_config.tp_size,
        }


def job_dropout_resume():
    """Random numbers of every rank are restored: 2 + 2 steps are 4, dropout included."""
    kept = trainer_for("dropout", tiny(dropout=0.3), save_strategy="steps", save_steps=2)
    kept.train()
    again = trainer_for("dropout", tiny(seed=5, dropout=0.3))
    again.train(resume_from_checkpoint=str(OUT / MODE / "dropout" / "checkpoint-2"))
    REPORT["dropout_resume"] = {
        "weights_equal": same(weights(again.model), weights(kept.model)),
        "history": history(again) == history(kept),
        "files": sorted(p.name for p in (OUT / MODE / "dropout" / "checkpoint-2").iterdir()),
    }


def job_full_eval():
    trainer = trainer_for("full_eval", tiny(dtype=torch.float32), bf16_full_eval=True)
    REPORT["full_eval"] = clean(trainer.evaluate())
    REPORT["auto_batch"] = run(
        "auto_find", trainer_for("auto", auto_find_batch_size=True)
    ).state.global_step


def job_patches_needed():
    """Take each patch away in turn: the same run has to go wrong, or the patch is idle."""
    from accelerate import Accelerator
    from accelerate.data_loader import DataLoaderDispatcher
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.scheduler import AcceleratedScheduler
    from accelerate.utils.operations import ConvertOutputsToFp32

    from hf_sp.model.lazy import LazyLogits

    tiny()
    known = json.loads((OUT / "plain-0.json").read_text())

    def differs(name, **kwargs):
        def check():
            # As many steps as the run that it is compared with.
            run("mutant", trainer_for("mutant" if name == "train" else "v-mutant", **kwargs))
            mine, theirs = REPORT.pop("mutant"), known[name]
            keys = ("history", "total_flos", "max_steps")
            return [k for k in keys if not close(mine[k], theirs[k])]

        return check

    def evaluation(name, **kwargs):
        def check():
            trainer = trainer_for("mutant", compute_metrics=metrics_of, **kwargs)
            return [] if close(clean(trainer.evaluate()), known[name]) else ["metrics"]

        return check

    def logits(**kwargs):
        def check():
            made, original = [], LazyLogits.materialize
            LazyLogits.materialize = lambda x: made.append(1) or original(x)
            try:
                trainer = trainer_for("mutant", tiny(dtype=torch.float32), max_steps=1, **kwargs)
                trainer.train()
                trainer.evaluate()
            finally:
                LazyLogits.materialize = original
            return ["logits"] * len(made)

        return check

    def speed():
        trainer = trainer_for("mutant")
        found = trainer.evaluate()
        steps = found["eval_steps_per_second"] * found["eval_runtime"]
        return [] if abs(steps - 4) < 0.4 else [steps]

    def predict_speed():
        found = trainer_for("mutant").predict(Rows(7, seed=8)).metrics
        steps = found["test_steps_per_second"] * found["test_runtime"]
        return [] if abs(steps - 4) < 0.4 else [steps]

    def random_metrics():
        def compute(prediction):
            return {"random": random.random() + RANK}

        metric = trainer_for("mutant", compute_metrics=compute).evaluate()["eval_random"]
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, metric)
        return [] if len(set(everyone)) == 1 else everyone

    def loop():
        saved = REPORT["accelerate"]
        try:
            job_accelerate()
            mine = REPORT["accelerate"]
        finally:
            REPORT["accelerate"] = saved
        keys = ("losses", "rates", "rows", "predictions")
        return [k for k in keys if not close(mine[k], known["accelerate"][k])]

    def other_degree():
        folder = OUT / "one" / "dropout" / "checkpoint-2"
        trainer = trainer_for("mutant")
        torch.manual_seed(100 + RANK)
        trainer._load_rng_state(str(folder))
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, float(torch.rand(())))
        return [] if len(set(everyone)) == 1 else everyone

    def foreign():
        dead = torch.optim.AdamW(tiny(parallel=False).parameters())
        found = refused(lambda: trainer_for("mutant", optimizers=(dead, None)))
        return [] if found["type"] == "ConfigError" else ["accepted"]

    def lacking():
        model = tiny()
        trainer = trainer_for("mutant", model)
        result = model.load_state_dict({}, strict=False)
        found = refused(lambda: trainer._issue_warnings_after_load(result))
        return [] if found["type"] == "CheckpointError" else ["accepted"]

    def disagreeing():
        config = ParallelismConfig(tp_size=WORLD, cp_size=2)
        found = refused(lambda: trainer_for("mutant", parallelism_config=config))
        return [] if found["type"] == "ConfigError" else ["accepted"]

    def empty_shards():
        from torch import nn
        from torch.distributed.tensor import Shard, distribute_tensor

        model = tiny()
        accelerator = trainer_for("mutant", model).accelerator
        for name in ("a", "b"):
            one = distribute_tensor(
                torch.ones(1, 3), model.lm_head.weight.device_mesh, [Shard(0)], src_data_rank=None
            )
            model.register_parameter(name, nn.Parameter(one))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        accelerator.prepare(model, optimizer)
        found = len({id(p) for g in optimizer.param_groups for p in g["params"]})
        wanted = len(list(model.parameters()))
        everyone = [None] * WORLD
        dist.all_gather_object(everyone, found)
        return [] if everyone == [wanted] * WORLD else everyone

    same_length = {"train_dataset": even_rows_of(12), "num_train_epochs": 1, "max_steps": -1}
    dispatch = {"accelerator_config": {"dispatch_batches": True}}
    cases = [
        (
            Trainer,
            "_get_num_items_in_batch",
            differs("tokens_local", average_tokens_across_devices=False),
        ),
        (Trainer, "_track_num_input_tokens", differs("train", include_num_input_tokens_seen="all")),
        (Trainer, "store_flos", differs("train", include_num_input_tokens_seen="all")),
        (
            Trainer,
            "_get_train_sampler",
            differs("rebalance", train_sampling_strategy="batch_rebalance"),
        ),
        (
            Trainer,
            "_get_dataloader",
            differs("workers", collator=noisy_collate, dataloader_num_workers=2, max_steps=2),
        ),
        (Trainer, "prediction_step", logits()),
        (Trainer, "evaluation_loop", random_metrics),
        (Trainer, "log", speed),
        (Trainer, "predict", predict_speed),
        (Trainer, "_load_rng_state", other_degree),
        (Trainer, "_validate_args", foreign),
        (Trainer, "_issue_warnings_after_load", lacking),
        (Trainer, "_build_accelerator_args", disagreeing),
        (Accelerator, "gather_for_metrics", evaluation("eval_first")),
        (Accelerator, "prepare_data_loader", loop),
        (Accelerator, "_prepare_tp", empty_shards),
        (Accelerator, "prepare", loop),
        (DataLoaderDispatcher, "__len__", differs("dispatch", **same_length, **dispatch)),
        (AcceleratedScheduler, "step", loop),
        (ConvertOutputsToFp32, "__call__", logits(bf16=True)),
        (ParallelismConfig, "_validate_accelerator", differs("train")),
    ]
    REPORT["patches"] = {}
    for owner, name, check in cases:
        patched = getattr(owner, name)
        setattr(owner, name, bare(patched.__hf_sp_original__))
        try:
            found = check()
        except Exception as error:  # any way of going wrong will do
            found = [f"{type(error).__name__}: {str(error)[:80]}"]
        finally:
            setattr(owner, name, patched)
        REPORT["patches"][f"{owner.__name__}.{name}"] = found
        reset_accelerate()
    REPORT["patches_intact"] = {}
    # The others are the runs that are compared elsewhere.
    alone = (random_metrics, speed, predict_speed, other_degree, foreign, lacking, empty_shards)
    for owner, name, check in cases:
        if check not in alone:
            continue
        REPORT["patches_intact"][f"{owner.__name__}.{name}"] = check()


def bare(original):
    """The original, marked as patched: every ``parallelize`` puts the missing patches in place."""

    @functools.wraps(original)
    def method(*args, **kwargs):
        return original(*args, **kwargs)

    method.__hf_sp_original__ = original
    return method


def reset_accelerate():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def close(a, b):
    if isinstance(a, dict):
        return all(k in b and close(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        return abs(a - b) <= 1e-5 * max(abs(a), abs(b))
    return a == b


def job_misuse():
    """Last: rank 0 alone calls save_pretrained."""
    os.environ["HF_SP_SAVE_TIMEOUT"] = "2"
    model = tiny()
    if RANK == 0:
        REPORT["misuse"] = refused(lambda: model.save_pretrained(OUT / "misuse"))
        REPORT["misuse"]["written"] = (OUT / "misuse").exists()
    dist.barrier()


JOBS = {
    "plain": [
        job_train,
        job_variants,
        job_eval,
        job_resume,
        job_best,
        job_accelerate,
        job_full_eval,
    ],
    "one": [job_resume, job_save, job_dropout_resume, job_cross],
    "tp": [
        job_train,
        job_variants,
        job_eval,
        job_resume,
        job_best,
        job_save,
        job_optimizer,
        job_cross,
        job_refusals,
        job_trainer_saves,
        job_accelerate,
        job_dropout_resume,
        job_full_eval,
        job_patches_needed,
        job_misuse,
    ],
    "back": [job_cross],
    "four": [job_cross],
}


def main():
    random.seed(0)
    wanted = sys.argv[3:]
    for job in JOBS[MODE]:
        if wanted and job.__name__ not in wanted:
            continue
        started = time.monotonic()
        job()
        print(f"rank {RANK}: {job.__name__} {time.monotonic() - started:.1f} s", flush=True)
    REPORT["versions"] = transformers.__version__
    (OUT / f"{MODE}-{RANK}.json").write_text(json.dumps(REPORT))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
