"""Jobs: TRL's trainers over groups of tp ranks; one process has the batches of all groups."""

from __future__ import annotations

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from integrations.rows_trl import WORDS, tokenizer
from integrations.scene import checksum, clean, weights

KEYS = {
    SFTTrainer: ("entropy", "mean_token_accuracy", "num_tokens"),
    DPOTrainer: (
        *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
        *("logps/chosen", "logps/rejected"),
    ),
}


def _rows(kind, n):
    def text(i, words):
        return " ".join(WORDS[3 + (7 * i + 5 * j) % 58] for j in range(words))

    if kind is SFTTrainer:
        return [{"text": text(i, 3 + 5 * i % 7)} for i in range(n)]
    return [
        {"prompt": text(i, 3) + " ", "chosen": text(i + 1, 2 + i % 3), "rejected": text(i + 2, 2)}
        for i in range(n)
    ]


def _train(scene, name, kind, adapters, rows=None, **options):
    config = SFTConfig if kind is SFTTrainer else DPOConfig
    more = {}
    if adapters:
        targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
        more["peft_config"] = LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    elif kind is DPOTrainer:
        more["ref_model"] = scene.tiny(seed=4)
    size = scene.groups if scene.plain else 1
    arguments = config(
        output_dir=str(scene.out / scene.mode / name),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        per_device_train_batch_size=2 * size,
        # TRL's losses of an evaluation are each group's own.
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        max_grad_norm=0.5,
        learning_rate=1e-2,
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )
    model = scene.tiny()
    torch.manual_seed(5)
    trainer = kind(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows or _rows(kind, 24)),
        eval_dataset=Dataset.from_list(_rows(kind, 7)),
        processing_class=tokenizer(),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    keys = ("loss", "grad_norm", "epoch", *KEYS[kind])
    steps = [r for r in trainer.state.log_history if "loss" in r]
    evaluation = clean(trainer.evaluate())
    return {
        "history": [{k: r[k] for k in keys if k in r} for r in steps],
        # Of packed batches Trainer takes the mean over batches, each a row to it.
        "eval_loss": evaluation["eval_loss"] if kind is SFTTrainer and not options else None,
        "weights": checksum(weights(trainer.model)),
    }


def train(scene):
    """Full and with adapters that the trainer adds."""
    disable_progress_bars()
    # Documents in rows without padding, laid end to end; of one length, so that the rows are a
    # whole number of steps' in any group.
    rows = [{"text": " ".join(WORDS[3 + (7 * i + j) % 58] for j in range(6))} for i in range(96)]
    options = {"packing": True, "max_length": 24, "eval_packing": False}
    packed = _train(scene, "packed", SFTTrainer, False, rows, **options)
    return {"SFTTrainer-packed": packed} | {
        f"{kind.__name__}-{'lora' if adapters else 'full'}": _train(
            scene, f"{kind.__name__}-{adapters}", kind, adapters
        )
        for kind in KEYS
        for adapters in (False, True)
    }
