"""One run of the demo: a stock Trainer, and one line for hf_sp.

    python scripts/demo_train.py --data DIR --results DIR
    torchrun --standalone --nproc_per_node 2 scripts/demo_train.py --data DIR --results DIR --tp 2

`demo.py` makes the data, starts both, and compares what they leave in their run folders.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from array import array
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_sp import parallelize
from hf_sp.estimate import StepCount, count_step, per_layer

SEED = 0
SEQ = 256
BATCH = 2
COUNTED_SEQ = 1024  # costs are counted on longer sequences than the demo has the time to train on
RANK = int(os.environ.get("RANK", "0"))
# One device can hold one rank of a NCCL group: below two GPUs the demo stays on the CPU.
USE_CUDA = os.environ.get("HF_SP_DEMO_DEVICE", "cpu") == "cuda"


def make_model(vocab_size: int, layers: int = 4) -> LlamaForCausalLM:
    set_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,  # odd on purpose: no tp divides it
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=COUNTED_SEQ,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=0,
        )
    )


class Blocks(Dataset):
    """Consecutive blocks of SEQ tokens."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self.blocks = tokens[: tokens.numel() // SEQ * SEQ].view(-1, SEQ)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[i], "labels": self.blocks[i]}


def load_tokens(path: Path) -> torch.Tensor:
    tokens = array("H")
    tokens.frombytes(path.read_bytes())
    return torch.tensor(tokens, dtype=torch.long)


def tell(**event: object) -> None:
    """One line that demo.py reads; everything else on stdout is log."""
    if RANK == 0:
        print("@demo " + json.dumps(event), flush=True)


class Progress(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            tell(step=state.global_step, steps=state.max_steps, loss=logs["loss"])


def count(vocab_size: int, tp: int, **switches: bool) -> dict[str, object]:
    """Count what a training step costs this rank: the whole model, and one layer of it."""
    device = torch.device("cuda", torch.cuda.current_device()) if USE_CUDA else torch.device("cpu")
    ids = torch.randint(
        vocab_size, (BATCH, COUNTED_SEQ), generator=torch.Generator().manual_seed(SEED)
    )
    ids = ids.to(device)

    def measured(layers: int) -> StepCount:
        model = make_model(vocab_size, layers).to(device).train()
        if tp > 1:
            model = parallelize(model, tp=tp, **switches)
        bf16 = torch.autocast("cuda", torch.bfloat16) if USE_CUDA else contextlib.nullcontext()
        with bf16:
            return count_step(lambda: model(input_ids=ids, labels=ids).loss)

    small, large = measured(4), measured(5)
    layer = per_layer(small, large)

    def calls(kinds) -> dict[str, list[int]]:
        return {kind: [c.calls, c.bytes] for kind, c in kinds.items() if c.calls}

    return {
        "alive_bytes": small.alive_bytes,
        "peak_bytes": small.peak_bytes,
        "layer_alive_bytes": layer.alive_bytes,
        "layer_forward": calls(layer.forward),
        "layer_backward": calls(layer.backward),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder made by demo.py")
    parser.add_argument("--results", type=Path, required=True, help="where results and model go")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tp", type=int, default=1)
    options = parser.parse_args()

    tokens = load_tokens(options.data / "tokens.bin")
    vocab_size = len(AutoTokenizer.from_pretrained(options.data / "tokenizer"))
    held_out = 8 * SEQ

    model = make_model(vocab_size)
    if options.tp > 1:
        model = parallelize(model, tp=options.tp, sp=True)  # the one line

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.results),
            max_steps=options.steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
            learning_rate=2e-3,
            lr_scheduler_type="linear",
            warmup_steps=10,
            adam_beta2=0.95,
            weight_decay=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=SEED,
            bf16=USE_CUDA,
            use_cpu=not USE_CUDA,
            dataloader_pin_memory=USE_CUDA,
        ),
        train_dataset=Blocks(tokens[:-held_out]),
        eval_dataset=Blocks(tokens[-held_out:]),
        callbacks=[Progress()],
    )
    trainer.train()
    tell(phase="evaluating and saving")
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(options.results / "model"))

    tell(phase="counting bytes and collectives")
    counts = {"all": count(vocab_size, options.tp)}
    if options.tp > 1:
        counts["sp"] = count(vocab_size, options.tp, kernels=False)
        counts["tp"] = count(vocab_size, options.tp, sp=False, kernels=False)

    if RANK == 0:
        result = {
            "tp": options.tp,
            "device": "cuda" if USE_CUDA else "cpu",
            "log": [
                {key: entry[key] for key in ("step", "loss", "grad_norm")}
                for entry in trainer.state.log_history
                if "grad_norm" in entry
            ],
            "eval_loss": eval_loss,
            "counts": counts,
        }
        (options.results / "result.json").write_text(json.dumps(result, indent=1))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
