"""Jobs: models and checkpoints that are saved, loaded and resumed from."""

from __future__ import annotations

import copy
import os
import shutil

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.trainer_utils import load_sharded_checkpoint

from integrations.scene import history, refused, same, weights


def resume(scene):
    """Four steps, and two of them again from the checkpoint in the middle."""
    saved = scene.trainer("resume", max_steps=4, save_strategy="steps", save_steps=2)
    report = scene.train(saved)
    again = scene.trainer("resume", scene.tiny(seed=5), max_steps=4)
    again.train(resume_from_checkpoint=str(scene.out / scene.mode / "resume" / "checkpoint-2"))
    return {
        "saved": report,
        "resumed": {
            "history": history(again),
            "weights_equal": same(weights(again.model), weights(saved.model)),
        },
    }


def dropout_resume(scene):
    """Random numbers of every rank are restored: 2 + 2 steps are 4, dropout included."""
    model = scene.tiny(dropout=0.3)
    kept = scene.trainer("dropout", model, max_steps=4, save_strategy="steps", save_steps=2)
    kept.train()
    folder = scene.out / scene.mode / "dropout" / "checkpoint-2"
    again = scene.trainer("dropout", scene.tiny(seed=5, dropout=0.3), max_steps=4)
    again.train(resume_from_checkpoint=str(folder))
    return {
        "weights_equal": same(weights(again.model), weights(kept.model)),
        "history": history(again) == history(kept),
        "files": sorted(p.name for p in folder.iterdir()),
    }


def cross(scene, sources=("plain",)):
    """Resume from runs of other modes: a plain one-process run, or one at another degree."""
    reference = torch.load(scene.out / "plain-weights.pt")
    report = {}
    for source in sources:
        folder = scene.out / source / "resume" / "checkpoint-2"
        trainer = scene.trainer("cross", scene.tiny(seed=6), max_steps=4)
        trainer.train(resume_from_checkpoint=str(folder))
        error = max(
            float((w - reference[n]).abs().max() / reference[n].abs().max())
            for n, w in weights(trainer.model).items()
        )
        report[source] = {"error": error, "history": history(trainer)}
    return report


def tampered(scene):
    """A one-process ``optimizer.pt`` whose state lacks a row."""
    folder = scene.folder("tampered")
    if scene.rank == 0:
        shutil.copytree(scene.out / "plain" / "resume" / "checkpoint-2", folder)
        state = torch.load(folder / "optimizer.pt")
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"][:-1]
        torch.save(state, folder / "optimizer.pt")
    dist.barrier()
    trainer = scene.trainer("cross", scene.tiny(seed=6), max_steps=4)
    return refused(lambda: trainer.train(resume_from_checkpoint=str(folder)))


def _logits(model):
    ids = torch.arange(12).reshape(2, 6)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def save(scene):
    """``save_pretrained`` into plain transformers, and back into a model of ours."""
    report = {}
    for name, options in {"whole": {}, "sharded": {"max_shard_size": "3KB"}, "tied": {}}.items():
        model = scene.tiny(tie=name == "tied", dtype=torch.float32)
        folder = scene.folder(name)
        model.save_pretrained(folder, **options)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        other = scene.tiny(seed=9, tie=name == "tied", dtype=torch.float32)
        if name == "sharded":
            load_sharded_checkpoint(other, str(folder))
        else:
            other.load_state_dict(plain.state_dict())
        report[name] = {
            "equal": same(weights(model), dict(plain.named_parameters())),
            "config": "distributed_config" in (folder / "config.json").read_text(),
            "files": len(list(folder.glob("*.safetensors"))),
            "tied": plain.lm_head.weight is plain.model.embed_tokens.weight,
            "logits": float((_logits(model) - _logits(plain)).abs().max()),
            "loaded": same(weights(other), weights(model)),
        }
    model = scene.tiny(dtype=torch.bfloat16)
    model.save_pretrained(scene.folder("bf16"))
    plain = AutoModelForCausalLM.from_pretrained(scene.folder("bf16"))
    report["bf16"] = {
        "dtype": str(plain.dtype),
        "equal": same(weights(model), dict(plain.named_parameters())),
    }
    wrong = plain.state_dict()
    wrong["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4, dtype=torch.bfloat16)
    wrong["model.embed_tokens.weight"] = torch.zeros_like(wrong["model.embed_tokens.weight"])
    before = weights(model)
    report["wrong"] = refused(lambda: model.load_state_dict(wrong))
    report["wrong"]["untouched"] = same(before, weights(model))
    twin = copy.deepcopy(model)
    twin.load_state_dict({k: torch.zeros_like(v) for k, v in plain.state_dict().items()})
    report["wrong"]["deepcopy"] = same(before, weights(model)) and not any(
        float(p.abs().sum()) for p in weights(twin).values()
    )
    return report


def save_model(scene):
    """``save_model`` by the user, and ``save_only_model``."""
    options = {"max_steps": 1, "save_only_model": True, "save_strategy": "steps", "save_steps": 1}
    trainer = scene.trainer("user", **options)
    trainer.train()
    trainer.save_model(str(scene.folder("user")))
    plain = AutoModelForCausalLM.from_pretrained(scene.folder("user"), dtype=torch.float64)
    checkpoint = scene.out / scene.mode / "user" / "checkpoint-1"
    return {
        "equal": same(weights(trainer.model), dict(plain.named_parameters())),
        "files": sorted(p.name for p in checkpoint.iterdir()),
    }


def misuse(scene):
    """Rank 0 alone calls ``save_pretrained``."""
    os.environ["HF_SP_SAVE_TIMEOUT"] = "2"
    model = scene.tiny()
    report = {}
    if scene.rank == 0:
        report = refused(lambda: model.save_pretrained(scene.folder("misuse")))
        report["written"] = scene.folder("misuse").exists()
    dist.barrier()
    return report
