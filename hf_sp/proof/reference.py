"""The unsharded model as a judge: without dropout, its loss in its own dtype, weights that show.

Must not know parallel models.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def float64_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """HF's ForCausalLMLoss without its `logits.float()`.

    That upcast is a *down*cast for float64 logits: it rounds each logit by up to 6e-8 relative, and
    a logit whose two computations differ by 1e-16 may round to different float32 numbers. A
    reference with that rounding is good to 1e-8, not to 1e-10. hf_sp computes the loss of float64
    logits in float64, so the reference does too. Written from the definition (log-sum-exp minus the
    target's logit), not by calling F.cross_entropy, so that it does not share a fault with what it
    judges; tests/harness/test_tiny.py compares the two.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    flat = logits.reshape(-1, vocab_size)
    target = shift_labels.reshape(-1)
    counted = target != ignore_index
    picked = flat.gather(1, target.masked_fill(~counted, 0)[:, None])[:, 0]
    # where, not multiplication: an ignored row may hold anything.
    losses = torch.where(counted, flat.logsumexp(1) - picked, 0.0)
    items = counted.sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / items


def without_dropout(model: nn.Module) -> list[str]:
    """Set every dropout to zero; the modules that had one.

    Two runs that draw from other generators cannot be compared.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, DROPOUTS) and module.p:
            module.p = 0.0
            found.append(name)
        for attribute, value in list(vars(module).items()):
            named = re.search("dropout|jitter", attribute) and isinstance(value, float)
            if named and value:
                setattr(module, attribute, 0.0)
                found.append(f"{name}.{attribute}")
    return found


def scatter_weights(model: nn.Module, seed: int = 0) -> None:
    """Random weights of sizes at which a fault shows.

    transformers starts norms at one, biases at zero, and matrices so small that attention is nearly
    uniform: a dropped bias or norm weight and a wrong mask would hardly show.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.dim() < 2:
                value = 0.2 * noise + (0.0 if name.endswith("bias") else 1.0)
            elif "embed" in name:
                value = 0.5 * noise
            else:
                value = noise / noise.shape[-1] ** 0.5
            p.copy_(value)
