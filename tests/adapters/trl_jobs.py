"""TRL's trainers, plain in one process or on the ranks of a pool: one report of all runs.

What differs between the reports of ``plain`` and ``tp`` is what the integration got wrong. B is
random from the start; the ranks' seeds differ, and rank 0 draws what the plain run draws.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from datasets import Dataset, disable_progress_bars
from integrations.jobs import scene_of
from integrations.scene import Scene, launched, refused
from peft import LoraConfig, get_peft_model
from small import sizes
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

# Of the run that goes on in this process; set by `run_all`.
MODE, OUT, RANK, WORLD = "plain", Path(), 0, 1
REPORT: dict = {}

WORDS = [f"w{i}" for i in range(58)]
KEYS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate")


def tokenizer():
    vocab = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


SIZES = sizes(max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0)


def tiny(seed=0, parallel=True, kind=LlamaForCausalLM, config=LlamaConfig, **fields):
    torch.manual_seed(seed)
    model = kind(config(**SIZES, **fields)).to(torch.float64)
    # transformers' grouped products have no float64.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return shard(model) if parallel else model


def qwen3_moe(seed=0):
    """With the configuration's own coefficient of the auxiliary loss: TRL asks for it by itself."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 4}
    return tiny(seed, kind=Qwen3MoeForCausalLM, config=Qwen3MoeConfig, **sizes)


def mixtral(seed=0):
    return tiny(seed, kind=MixtralForCausalLM, config=MixtralConfig, num_local_experts=4)


def shard(model):
    if MODE != "plain":
        # Not at the top: the plain process must not have seen it.
        from hf_sp import parallelize

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
    rows = [{"prompt": sentence(g, 2, 7), "completion": " " + sentence(g, 1, 8)} for _ in range(n)]
    return Dataset.from_list(rows)


def pairs(n=16):
    g = torch.Generator().manual_seed(7)
    keys = {"prompt": (2, 6), "chosen": (1, 6), "rejected": (1, 6)}
    rows = [{k: sentence(g, *v) for k, v in keys.items()} for _ in range(n)]
    return Dataset.from_list([{**r, "prompt": r["prompt"] + " "} for r in rows])


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
    """Each kind of run; the files of the first are compared too."""
    first = sft("lora", peft_config=lora(), save_strategy="steps", save_steps=2, max_steps=4)
    with counted() as gathers:
        run("lora", first)
    # The norms of gradients are numbers.
    REPORT["gathers"] = sum(shape != () for shape in gathers)
    first.save_model()
    again = sft("lora", peft_config=lora(), max_steps=4)
    run("lora_resumed", again, resume_from_checkpoint=str(OUT / MODE / "lora" / "checkpoint-2"))
    run("full", sft("full"))
    run("tied", sft("tied", tiny(tie_word_embeddings=True), max_steps=2))
    run("packed", sft("packed", peft_config=lora(), packing=True, max_length=24))
    free = {"padding_free": True, "max_length": None, "gradient_checkpointing": False}
    run("padding_free", sft("free", peft_config=lora(use_rslora=True), **free))
    trainer = sft(
        "completions",
        data=completions(),
        peft_config=lora(),
        evaluation=completions(7),
        eval_strategy="steps",
        eval_steps=2,
    )
    run("completions", trainer)
    keys = ("eval_loss", "eval_entropy", "eval_mean_token_accuracy")
    REPORT["completions"]["eval"] = [
        {k: r[k] for k in keys} for r in trainer.state.log_history if "eval_loss" in r
    ]
    some = lora(target_modules=["q_proj", "down_proj"])
    run("dft", sft("dft", peft_config=some, loss_type="dft"))
    kept = lora(modules_to_save=["lm_head", "norm"], target_modules=["v_proj", "o_proj"])
    run("saved_modules", sft("saved", peft_config=kept))
    # PEFT first, parallelize second.
    torch.manual_seed(1000 + RANK)
    before = shard(get_peft_model(tiny(parallel=False), lora()))
    run("before", sft("before", before))


def job_cross():
    """Resume from what another degree has saved: stock Trainer, or two ranks."""
    for source in ("plain", "tp") if MODE == "back" else ("plain",):
        again = sft("cross", peft_config=lora(), max_steps=4)
        again.train(resume_from_checkpoint=str(OUT / source / "lora" / "checkpoint-2"))
        REPORT[f"cross_{source}"] = {
            "history": history(again),
            "weights": checksum(trained(again.model)),
        }


def preference(name, kind, arguments_kind, data, model=None, ref=None, config=None):
    """A run of DPO or KTO."""
    trainer = kind(
        model=tiny() if model is None else model,
        ref_model=ref,
        args=arguments(arguments_kind, name, max_length=24, beta=0.2),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=config,
    )
    trainer.remove_callback(PrinterCallback)
    run(name, trainer)
    both = [f"{a}/{b}" for a in ("rewards", "logps", "logits") for b in ("chosen", "rejected")]
    more = ("rewards/margins", "rewards/accuracies", "kl", "aux_loss")
    REPORT[name]["history"] = history(trainer, (*KEYS, *both, *more))


def job_dpo():
    preference("dpo_lora", DPOTrainer, DPOConfig, pairs(), config=lora())
    preference("dpo_full", DPOTrainer, DPOConfig, pairs(), ref=tiny(seed=4))


def job_moe():
    """The auxiliary loss, which TRL turns on for what has a coefficient of it."""
    for name, make in (("moe_qwen3", qwen3_moe), ("moe_mixtral", mixtral)):
        trainer = sft(name, make(), router_aux_loss_coef=0.5 if name == "moe_mixtral" else None)
        run(name, trainer)
        REPORT[name]["history"] = history(trainer, (*KEYS, "aux_loss"))
    preference("dpo_moe", DPOTrainer, DPOConfig, pairs(), model=qwen3_moe(), ref=qwen3_moe(4))


def job_more():
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs()]
    labelled = Dataset.from_list([{**r, "label": i % 3 > 0} for i, r in enumerate(rows)])
    preference("kto_lora", KTOTrainer, KTOConfig, labelled, config=lora())
    preference("kto_full", KTOTrainer, KTOConfig, labelled, ref=tiny(4))
    trainer = RewardTrainer(
        model=tiny(kind=LlamaForSequenceClassification, num_labels=1),
        args=arguments(RewardConfig, "reward", center_rewards_coefficient=0.1),
        train_dataset=pairs(),
        processing_class=tokenizer(),
    )
    trainer.remove_callback(PrinterCallback)
    run("reward", trainer)
    keys = (*KEYS, "accuracy", "margin", "mean_reward", "min_reward", "max_reward")
    REPORT["reward"]["history"] = history(trainer, keys)


@contextlib.contextmanager
def counted():
    """Whole tensors that are gathered meanwhile."""
    found = []
    original = DTensor.full_tensor

    def spy(self, **kwargs):
        found.append(tuple(self.shape))
        return original(self, **kwargs)

    with mock.patch.object(DTensor, "full_tensor", spy):
        yield found


class Other(SFTTrainer):
    """Stands for a trainer of TRL that derives from one that is supported."""

    __module__ = "trl.experimental.other"

    def __init__(self, **kwargs):
        Trainer.__init__(self, **kwargs)


def online(kind, config):
    """A trainer that generates what it trains on."""
    fields = {"use_cpu": True, "bf16": False, "num_generations": 2}
    return kind(
        model=tiny(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config(str(OUT / "online"), per_device_train_batch_size=2, **fields),
        train_dataset=completions(),
        processing_class=tokenizer(),
    )


def job_refusals():
    cases = {
        "activation_offloading": lambda: sft("r1", activation_offloading=True),
        "other": lambda: Other(model=tiny(), args=arguments(SFTConfig, "r2")),
        "grpo": lambda: online(GRPOTrainer, GRPOConfig),
        "rloo": lambda: online(RLOOTrainer, RLOOConfig),
    }
    REPORT["refusals"] = {name: refused(function) for name, function in cases.items()}


JOBS = {
    "plain": [job_sft, job_dpo, job_moe, job_more],
    "tp": [job_sft, job_dpo, job_moe, job_more, job_cross, job_refusals],
    "back": [job_cross],
}


def run_all(scene):
    """Every job of the scene's mode; the report."""
    global MODE, OUT, RANK, WORLD
    MODE, OUT, RANK, WORLD = scene.mode, scene.out, scene.rank, scene.world
    REPORT.clear()
    disable_progress_bars()
    for job in JOBS[MODE]:
        job()
    return json.loads(json.dumps(REPORT))


def on_rank(mode, out):
    """A rank's report."""
    with scene_of(mode, out) as scene:
        return run_all(scene)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    with launched(0, 1):
        report = run_all(Scene("plain", Path(sys.argv[1])))
    Path(sys.argv[1], "plain.json").write_text(json.dumps(report))
