"""LoRA on a model of fake tensors, for estimates."""

from __future__ import annotations

import torch
from torch import nn


def with_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Adapters of a rank on all linears, as PEFT makes them: in float32 over a base of less.

    Fake parameters can't be moved to another dtype, and need not be to another device.
    """
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    before, dtype = nn.Module.to, torch.get_default_dtype()
    nn.Module.to = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.set_default_dtype(torch.float32)
    try:
        return get_peft_model(model, adapters, autocast_adapter_dtype=False)
    finally:
        nn.Module.to = before  # type: ignore[method-assign]
        torch.set_default_dtype(dtype)
