"""Rank functions: short runs of the stock Trainer and of loops of one's own, saved and resumed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import tiny
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_sp import parallelize
from hf_sp.errors import HfSpError

# Smaller than the harness's: files and gathers are what costs here.
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def whole(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: whole(p).clone() for n, p in model.named_parameters()}


class Rows(Dataset):
    """Rows of nine tokens."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, 90, (24, 9), generator=g)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i].clone()}


@contextlib.contextmanager
def launched():
    """The environment that a launcher makes, which accelerate reads."""
    names: dict[str, Any] = {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    from accelerate.state import AcceleratorState

    if dist.is_initialized() and dist.get_world_size() > 1:
        names |= {
            "RANK": dist.get_rank(),
            "LOCAL_RANK": dist.get_rank(),
            "WORLD_SIZE": dist.get_world_size(),
            "LOCAL_WORLD_SIZE": dist.get_world_size(),
        }
    os.environ.update({k: str(v) for k, v in names.items()})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        AcceleratorState._reset_state(True)


def model_of(kind: str, seed: int = 0, **options: Any) -> nn.Module:
    """``llama``, ``lora`` (on a llama), or a sparse family; parallelized over all ranks."""
    family = "llama" if kind == "lora" else kind
    fields = SMALL if family == "llama" else {}
    model = tiny.build(family, torch.float64, seed=seed, **fields)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    return parallelize(model, **options)


def trainer_of(folder: Path, kind: str = "llama", seed: int = 0, options=None, **kwargs: Any):
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "seed": 3,
        "dataloader_pin_memory": False,
        **kwargs,
    }
    model = model_of(kind, seed, **(options or {}))
    return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=Rows())


def history(trainer: Trainer) -> list[tuple[int, float, float]]:
    return [
        (r["step"], r["loss"], float(r["grad_norm"]))
        for r in trainer.state.log_history
        if "loss" in r
    ]


def refused(call) -> str:
    """The text of our refusal; empty if there was none."""
    try:
        call()
    except HfSpError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def trains(folder: str, **kwargs: Any) -> dict[str, Any]:
    """A run, or the rest of one."""
    resume = kwargs.pop("resume", None)
    with launched():
        trainer = trainer_of(Path(folder), **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return {"history": history(trainer), "weights": weights(trainer.model)}
