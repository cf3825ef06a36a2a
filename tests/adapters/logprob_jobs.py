"""Rank functions: the head's token statistics against whole logits and autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from harness.report import Report
from torch.distributed.device_mesh import init_device_mesh

from hf_sp.comm import collectives as comm
from hf_sp.kernels.cross_entropy_steps import LossTerms
from hf_sp.kernels.vocab import vocab_range
from hf_sp.model.chunks import HeadSpec
from hf_sp.model.logprobs import FIELDS, token_statistics


def statistics(
    sharded: bool, vocab: int = 13, chunk: int = 6, bias: bool = True, **options: Any
) -> Report:
    """Outputs, and gradients by hidden states, weight and bias."""
    report = Report(f"{sharded} {vocab} {chunk} {options}", dist.get_rank())
    axis = comm.Axis.of(init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",)))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def exact(*shape: int) -> torch.Tensor:
        # Quarters: products and sums have no rounding, and logits tie, to the bit.
        return torch.randint(-4, 5, shape, generator=generator).double() / 4

    B, S, H = 2, 7, 5
    hidden, weight, offset = exact(B, S, H), exact(vocab, H), exact(vocab)
    labels = torch.randint(vocab, (B, S), generator=generator)
    labels[0, :3] = -100
    upstream = [random(B, S), random(B, S)]
    weight[4], offset[4] = weight[2], offset[2]

    whole = [t.clone().requires_grad_() for t in (hidden, weight, offset)]
    logits = whole[0] @ whole[1].t() + (whole[2] if bias else 0)
    logits = logits * options.get("scale", 1.0)
    if options.get("cap"):
        logits = options["cap"] * torch.tanh(logits / options["cap"])
    temperature, cap = options.get("temperature", 1.0), options.get("cap")
    logits = logits / temperature
    log_p = logits.log_softmax(-1)
    counted = labels != -100
    index = labels.clamp(min=0).unsqueeze(-1)
    want = {
        "log_probs": log_p.gather(-1, index).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": logits.mean(-1),
        "is_top1": logits.argmax(-1) == index.squeeze(-1),
    }
    want = {n: torch.where(counted, t, torch.zeros_like(t)) for n, t in want.items()}
    (want["log_probs"] * upstream[0] + want["entropy"] * upstream[1]).sum().backward()

    start, stop = vocab_range(vocab, axis)
    source = comm.own_shard(hidden, axis) if sharded else hidden.clone()
    mine = [t.clone().requires_grad_() for t in (source, weight[start:stop], offset[start:stop])]
    # A temperature is part of the two, as for TRL's trainers.
    terms = LossTerms(
        vocab=vocab,
        start=start,
        softcap=cap and cap / temperature,
        scale=options.get("scale", 1.0) / temperature,
    )
    spec = HeadSpec(terms, axis, sharded, chunk)
    inputs = mine[0], mine[1], mine[2] if bias else None, labels, spec
    got = token_statistics(*inputs)
    for name, tensor in got._asdict().items():
        report.compare(name, tensor.double(), want[name].double())
    (got.log_probs * upstream[0] + got.entropy * upstream[1]).sum().backward()
    dx = whole[0].grad
    report.compare("hidden", mine[0].grad, comm.own_shard(dx, axis) if sharded else dx)
    scale = float(whole[1].grad.abs().max())
    report.compare("weight", mine[1].grad, whole[1].grad[start:stop], scale)
    if bias:
        report.compare("bias", mine[2].grad, whole[2].grad[start:stop], scale)
    # Fewer fields are asked for, and no gradient of an entropy.
    again = token_statistics(*inputs, fields=("is_top1",))
    report.compare("alone", again.log_probs, got.log_probs)
    if any(x is not None for n, x in again._asdict().items() if n in FIELDS[:3]):
        report.problems.append("fields that nobody asked for")
    mine[0].grad = None
    (again.log_probs * upstream[0]).sum().backward()
    if mine[0].grad is None:
        report.problems.append("no gradient")
    return report
