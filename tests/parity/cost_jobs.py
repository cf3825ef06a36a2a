"""Rank functions for the counts."""

from __future__ import annotations

from typing import Any

import torch
from small import sizes
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sp import parallelize
from hf_sp.estimate import count_step


class _Log(TorchDispatchMode):
    """Every functional collective, in order, with the shape of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("_c10d_functional") and "wait" not in name:
            self.lines.append(f"{name} {tuple(args[0].shape)} {args[0].dtype}")
        return func(*args, **(kwargs or {}))


def collective_log(sp: bool) -> dict[str, Any]:
    """A step's collectives in order, and their number by kind."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    wide = sizes(vocab_size=128, hidden_size=512, intermediate_size=1792, **heads)
    config = LlamaConfig(**wide)
    model = parallelize(LlamaForCausalLM(config).to(torch.bfloat16).train(), sp=sp)
    ids = torch.zeros(2, 37, dtype=torch.long)

    def forward() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    # The first forwards compare all of the batch over the ranks, later ones a digest.
    while model._hf_sp_state.checks_left["training"]:
        forward()
    with _Log() as log:
        count = count_step(forward)
    calls = {k: c.calls for k, c in count.forward.items() if c.calls}
    calls |= {f"{k} backward": c.calls for k, c in count.backward.items() if c.calls}
    return {"log": log.lines, "calls": calls}
