"""Chunked, vocab-parallel cross entropy over the LM head: whole logits never exist.

Gradients are made in the forward (three matrix products, none repeated) without the loss's scale:
``p - onehot`` is of order one, so that half precision neither under- nor overflows; the scale
``grad_output / denominator`` is applied once in backward.

Shape letters: as in ``hf_sp.model.chunks``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.kernels.cross_entropy_steps import combine, share, token_statistics, write_gradient
from hf_sp.model.chunks import Chunks, HeadGradients, HeadSpec


def linear_cross_entropy(
    hidden: Tensor, weight_vH: Tensor, bias_v: Tensor | None, labels_BS: Tensor, spec: HeadSpec
) -> Tensor:
    """Summed cross entropy of ``hidden W^T + b``, whose logits are never whole, in any dimension.

    Shapes:   hidden [B, s, H], this rank's rows of the sequence, the last ones padded where tp does
              not divide S; [B, S, H], the same on all ranks, if not ``sharded``; weight [v, H],
              this rank's rows of the vocabulary; labels [B, S], whole and as they count (shifted
              already) -> a scalar, equal bits on all ranks
    dtype:    logits in the dtype of hidden and weight; statistics, loss and the sum of the weight's
              gradient over the chunks in float32 (float64 for float64)
    Forward:  per chunk of T tokens 1 all-gather of hidden rows [T, H] (``sharded``), 1 of [3, T]
              statistics in float32, and 1 reduce-scatter (else all-reduce) of the gradient [T, H];
              without grad mode no reduction
    Backward: no collective
    Saves:    the gradients: hidden's shape, [v, H], [v]
    Bytes:    alive at a time, for half precision: 2 v a token of the chunk (the logits, whose place
              the gradient takes), 6 H; a logit is read twice and written once after it was made
    Source:   Liu et al., Liger Kernel, arXiv:2410.10989, section 3.2 (gradients in the forward);
              Korthikanti et al., arXiv:2205.05198 (the sequence shards)
    """
    return _LinearCrossEntropy.apply(hidden, weight_vH, bias_v, labels_BS, spec)


class _LinearCrossEntropy(Node):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, weight_vH, bias_v, labels_BS, spec = inputs
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        needs, chunks = ctx.needs_input_grad[:3], Chunks(hidden, labels_BS, spec)
        grads = HeadGradients(chunks, weight_vH, needs)
        for x_TH, labels_T, rows in chunks:
            logits_Tv = F.linear(x_TH, weight_vH, bias_v)
            stats = share(token_statistics(logits_Tv, labels_T, spec.terms), spec.axis)
            whole = combine(stats, labels_T, spec.terms)
            total += whole.loss.sum()
            if any(needs):
                # Nobody else has these logits: the gradient takes their place.
                grads.add(write_gradient(logits_Tv, labels_T, whole, spec.terms), x_TH, rows)
            # Or the next chunk's logits would be made beside these.
            del logits_Tv, x_TH
        dhead = grads.head
        if dhead is not None and weight_vH.dtype != torch.float16:
            # float16 keeps its sum over many tokens in float32 until the scale makes it small.
            dhead = dhead.to(weight_vH.dtype)
        ctx.save_for_backward(grads.source, dhead, grads.bias)
        ctx.dtypes = hidden.dtype, weight_vH.dtype, weight_vH.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Once: under checkpointing saved tensors can be unpacked a single time.
        saved = ctx.saved_tensors
        scaled = [
            None if grad is None else (grad * grads[0].to(_wide(grad))).to(dtype)
            for grad, dtype in zip(saved, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def scaled_loss(total: Tensor, items: Tensor | float) -> Tensor:
    """``total / items``, and a gradient of zero where ``items`` is zero.

    torch's cross entropy writes no gradient for ignored tokens, so that a batch without a counted
    label trains nothing; dividing by its count would make every gradient nan.
    """
    # A number is filled in on the device: no copy, no synchronisation.
    items = items.to(total.device) if isinstance(items, Tensor) else total.new_full((), items)
    counted = items != 0
    return (total / items.masked_fill(~counted, 1)).where(counted, total.detach() / items)
