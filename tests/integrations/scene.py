"""One rank's side of a job: the tiny model, a Trainer over it, and the numbers that are compared.

``plain`` is the unmodified model in one process; any other mode is the same code with the one line
added. What differs between two reports is what the integration got wrong.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from small import sizes
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from integrations.data import Rows, collate


@dataclass(frozen=True)
class Scene:
    """Where a job runs: its mode, the folder of all files, and this rank among how many.

    Args:
        mode: a name of its files; ``plain...`` is the unmodified model.
        groups: of tp ranks, with a batch of their own; one process is given those of all.
        replicas: groups that hold the same weights.
        cp: context parallel ranks of a group.
    """

    mode: str
    out: Path
    rank: int = 0
    world: int = 1
    groups: int = 1
    replicas: int = 1
    cp: int = 1

    @property
    def plain(self):
        return self.mode.startswith("plain")

    @property
    def degrees(self):
        """The arguments of ``parallelize``."""
        found = {"tp": self.world // self.groups // self.cp, "cp": self.cp}
        data = {"dp_shard": self.groups // self.replicas, "dp_replicate": self.replicas}
        return {**found, **data} if self.groups > 1 else found

    def folder(self, name):
        """A folder of this mode and degree, the same on all ranks."""
        return self.out / f"{self.mode}{self.world}-{name}"

    def fresh(self, name):
        """An empty folder that no other call has, the same on all ranks."""
        found = self.out / f"{name}-{sum(p.name.startswith(name) for p in self.out.iterdir())}"
        dist.barrier()
        found.mkdir(exist_ok=True)
        dist.barrier()
        return found

    def tiny(
        self,
        seed=0,
        *,
        tie=False,
        dropout=0.0,
        parallel=True,
        dtype=torch.float64,
        rank_seeds=True,
        **options,
    ):
        torch.manual_seed(seed)
        config = LlamaConfig(
            **sizes(max_position_embeddings=32),
            tie_word_embeddings=tie,
            attention_dropout=dropout,
            attn_implementation="eager" if dropout else "sdpa",
        )
        model = LlamaForCausalLM(config).to(dtype)
        # Weights of a size at which gradients are clipped and losses differ between batches.
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4.0)
        if self.plain or not parallel:
            return model
        # Not at the top: the plain process must not have seen it.
        from hf_sp import parallelize

        if rank_seeds:
            # Ranks must not agree by accident.
            torch.manual_seed(1000 + self.rank)
        return parallelize(model, **self.degrees, **options)

    def arguments(self, name, **kwargs):
        options = {
            "output_dir": str(self.out / self.mode / name),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "per_device_train_batch_size": 2 * (self.groups if self.plain else 1),
            "per_device_eval_batch_size": 2 * (self.groups if self.plain else 1),
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_grad_norm": 0.5,
            "max_steps": 2,
            "lr_scheduler_type": "linear",
            "save_strategy": "no",
            "seed": 3,
            "dataloader_pin_memory": False,
            **kwargs,
        }
        return TrainingArguments(**options)

    def trainer(
        self, name, model=None, *, train=20, evaluation=7, kind=Trainer, collator=collate, **kwargs
    ):
        own = {
            k: kwargs.pop(k)
            for k in ("compute_metrics", "optimizers", "compute_loss_func", "model_init")
            if k in kwargs
        }
        train_dataset = kwargs.pop("train_dataset", None) or Rows(train)
        eval_dataset = kwargs.pop("eval_dataset", None) or Rows(evaluation, seed=8)
        if "model_init" not in own and model is None:
            model = self.tiny()
        trainer = kind(
            model=model,
            args=self.arguments(name, **kwargs),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            **own,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train(self, trainer, **kwargs):
        """Train, and what is compared of it."""
        result = trainer.train(**kwargs)
        return {
            "history": history(trainer),
            "train_loss": result.training_loss,
            "total_flos": trainer.state.total_flos,
            "max_steps": trainer.state.max_steps,
            "weights": checksum(weights(trainer.model)),
        }

    def everywhere(self, value):
        """The value of every rank, in rank order."""
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextlib.contextmanager
def launched(rank, world):
    """What torchrun and ``accelerate launch`` tell a process, and nothing of it afterwards."""
    before = dict(os.environ)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
    disable_progress_bar()
    reset_accelerate()
    try:
        yield
    finally:
        reset_accelerate()
        os.environ.clear()
        os.environ.update(before)


def reset_accelerate():
    """Forget the state that all accelerators of a process share."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


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


def clean(metrics):
    drop = ("runtime", "per_second", "preparation")
    return {k: v for k, v in metrics.items() if not any(d in k for d in drop)}


def refused(call):
    """The refusal that a call meets, as data."""
    from hf_sp.errors import HfSpError

    try:
        call()
    except HfSpError as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": None, "message": ""}


@contextlib.contextmanager
def logits_made():
    """A list that grows by one whenever whole logits are made."""
    from hf_sp.model.lazy import LazyLogits

    made, original = [], LazyLogits.materialize
    LazyLogits.materialize = lambda self: made.append(1) or original(self)
    try:
        yield made
    finally:
        LazyLogits.materialize = original
