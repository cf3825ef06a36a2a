"""The script that the TRL tests start: plain in one process, or on several ranks. Reports JSON.

What differs between the reports of ``plain`` and ``tp`` is what the integration got wrong. B is
random from the start; the ranks' seeds differ, and rank 0 draws what the plain run draws.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

MODE = sys.argv[1]
OUT = Path(sys.argv[2])
RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
REPORT: dict = {}

if MODE != "plain":
    from hf_sp import parallelize
    from hf_sp.collectives import all_gather
    from hf_sp.errors import HfSpError

WORDS = [f"w{i}" for i in range(58)]
KEYS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate")


def tokenizer():
    vocab = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def tiny(seed=0, tie=False, parallel=True):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)
    return shard(model) if parallel else model


def shard(model):
    if MODE != "plain":
        model = parallelize(model, tp=WORLD)
    torch.manual_seed(1000 + RANK)
    return model


def sentence(g, low, high):
    n = int(torch.randint(low, high, (), generator=g))
    return " ".join(WORDS[i] for i in torch.randint(0, 58, (n,), generator=g))


def texts(n=24):
    g = torch.Generator().manual_seed(5)
    return Dataset.from_list([{"text": sentence(g, 3, 14)} for _ in range(n)])


def completions(n=24):
    g = torch.Generator().manual_seed(6)
    rows = [
        {"prompt": sentence(g, 2, 7), "completion": " " + sentence(g, 1, 8)} for _ in range(n)
    ]
    return Dataset.from_list(rows)


def pairs(n=16):
    g = torch.Generator().manual_seed(7)
    keys = {"prompt": (2, 6), "chosen": (1, 6), "rejected": (1, 6)}
    return Dataset.from_list([{k: sentence(g, *v) for k, v in keys.items()} for _ in range(n)])


def lora(**fields):
    # init_lora_weights=False draws B too.
    options = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**{**options, "task_type": "CAUSAL_LM", **fields})


def arguments(kind, name, **kwargs):
    return kind(
        **{
            "output_dir": str(OUT / MODE / name),
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.5,
            "max_steps": 3,
            "save_strategy": "no",
            "seed": 3,
            "dataloader_pin_memory": False,
            "max_length": 16,
            **kwargs,
        }
    )


def sft(name, model=None, data=None, evaluation=None, peft_config=None, **kwargs):
    trainer = SFTTrainer(
        model=tiny() if model is None else model,
        args=arguments(SFTConfig, name, **kwargs),
        train_dataset=texts() if data is None else data,
        eval_dataset=evaluation,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def history(trainer, keys=KEYS):
    return [{k: r[k] for k in keys if k in r} for r in trainer.state.log_history if "loss" in r]


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def trained(model):
    return {n: full(p.detach()).clone() for n, p in model.named_parameters() if p.requires_grad}


def checksum(tensors):
    return {
        n: [float(t.double().abs().sum()), float(t.double().square().sum())]
        for n, t in tensors.items()
    }


def same_on_all_ranks(model):
    """Replicated parameters are bit-equal."""
    if MODE == "plain" or WORLD == 1:
        return True
    for p in model.parameters():
        local = p.to_local() if hasattr(p, "to_local") else p
        if local.shape == p.shape:
            first = local.detach().clone()
            dist.broadcast(first, src=0)
            if not torch.equal(first, local.detach()):
                return False
    return True


def run(name, trainer, **kwargs):
    result = trainer.train(**kwargs)
    REPORT[name] = {
        "history": history(trainer),
        "train_loss": result.training_loss,
        "weights": checksum(trained(trainer.model)),
        "replicas": same_on_all_ranks(trainer.model),
    }
    return trainer


def job_sft():
    trainer = run("lora", sft("lora", peft_config=lora(), save_strategy="steps", save_steps=2,
                              max_steps=4, evaluation=None))
    trainer.save_model()
    run("lora_resumed", sft("lora", tiny(), peft_config=lora(), max_steps=4),
        resume_from_checkpoint=str(OUT / MODE / "lora" / "checkpoint-2"))
    run("full", sft("full"))
    run("tied", sft("tied", tiny(tie=True), max_steps=2))
    run("packed", sft("packed", peft_config=lora(), packing=True, max_length=24))
    run("padding_free", sft("free", peft_config=lora(use_rslora=True), padding_free=True,
                            max_length=None, gradient_checkpointing=False))
    run("completions", sft("completions", data=completions(), peft_config=lora(),
                           evaluation=completions(7), eval_strategy="steps", eval_steps=2))
    run("dft", sft("dft", peft_config=lora(target_modules=["q_proj", "down_proj"]),
                   loss_type="dft"))
    run("saved_modules", sft("saved", peft_config=lora(modules_to_save=["lm_head", "norm"],
                                                       target_modules=["v_proj", "o_proj"])))


def main():
    for job in JOBS[MODE]:
        if sys.argv[3:] and job.__name__ not in sys.argv[3:]:
            continue
        started = time.monotonic()
        job()
        print(f"rank {RANK}: {job.__name__} {time.monotonic() - started:.1f} s", flush=True)
    (OUT / f"{MODE}-{RANK}.json").write_text(json.dumps(REPORT))
    if dist.is_initialized():
        dist.destroy_process_group()


JOBS = {"plain": [job_sft], "tp": [job_sft]}

if __name__ == "__main__":
    main()
