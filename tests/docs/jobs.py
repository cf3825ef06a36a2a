"""Rank functions: run the code of a page."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import torch.distributed as dist
from harness import batches, tiny
from transformers import AutoModelForCausalLM

import hf_sp


def page(blocks: list[str], folder: str) -> dict[str, Any]:
    """The blocks in turn, in one namespace, as a script of one page; what they have printed.

    Their names: a model that is parallelized, the folder it is from, a batch, a folder to write to.
    """
    name = f"{folder}/model"
    if dist.get_rank() == 0:
        tiny.build("llama", torch.float32).save_pretrained(name)
    dist.barrier()
    names: dict[str, Any] = {
        "torch": torch,
        "hf_sp": hf_sp,
        "AutoModelForCausalLM": AutoModelForCausalLM,
        "name": name,
        "out": f"{folder}/out",
        "batch": batches.plain(2, 9, 96),
        "model": hf_sp.parallelize(AutoModelForCausalLM.from_pretrained(name), tp=2),
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(block, names)
    embedding = names["model"].get_input_embeddings().weight.full_tensor()
    tokens = names.get("tokens")
    return {
        "printed": printed.getvalue(),
        "row": embedding[5].abs().sum().item(),
        "plain": "plain" in names and type(next(names["plain"].parameters())) is torch.nn.Parameter,
        "tokens": None if tokens is None else tokens.tolist(),
    }
