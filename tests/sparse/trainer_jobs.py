"""A sparse model in the stock Trainer: in one process, or as a rank function for a pool.

Modes: ``one`` (the unmodified model), ``split`` (experts split by features), ``whole`` (whole
experts), ``back`` (split, resumed from the middle of ``whole``).
"""

from __future__ import annotations

from pathlib import Path

import torch
from integrations.jobs import scene_of
from small import sizes
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

from hf_sp import parallel_state, parallelize


def on_rank(mode: str, out: str) -> dict:
    """Losses and norms by step and the load per expert, of this rank."""
    with scene_of(mode, out):
        return train(mode, Path(out))


def train(mode: str, out: Path) -> dict:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **sizes(hidden_size=64, intermediate_size=96, num_hidden_layers=3),
        moe_intermediate_size=40,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    model = Qwen3MoeForCausalLM(config)
    if mode != "one":
        model = parallelize(model, sp=True, ep=2 if mode == "whole" else 1)
    rows = torch.randint(0, 61, (16, 33), generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        model,
        TrainingArguments(
            str(out / ("whole" if mode == "back" else mode)),
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            learning_rate=1e-3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    resume = str(out / "whole" / "checkpoint-2") if mode == "back" else None
    trainer.train(resume_from_checkpoint=resume)
    log = [r for r in trainer.state.log_history if "grad_norm" in r]
    report = {"steps": [[r["loss"], r["grad_norm"]] for r in log]}
    if mode != "one":
        report["load"] = {k: v.tolist() for k, v in parallel_state(model).expert_load().items()}
    trainer.save_model(str(out / mode / "final"))
    return report
