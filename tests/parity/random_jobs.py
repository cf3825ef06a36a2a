"""One random model, batch and set of switches against the unsharded model; rank functions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from harness import tiny
from harness.compare import compare_gradients, compare_loss, evaluating, fresh, gradients, whole
from harness.report import Report
from torch import Tensor

from hf_sp import parallelize


@dataclass(frozen=True)
class Case:
    """What is drawn; `config` are fields of the family's configuration, `how` of `parallelize`."""

    family: str
    config: tuple[tuple[str, Any], ...]
    how: tuple[tuple[str, Any], ...]
    checkpoint: str
    batch: int
    length: int
    mask: str
    seed: int


def make_batch(case: Case, vocab: int) -> dict[str, Tensor]:
    """Ids, and what goes with the kind of mask; a label counts in each row."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = case.batch, case.length
    ids = torch.randint(0, vocab, shape, generator=generator)
    labels = ids.masked_fill(torch.rand(shape, generator=generator) < 0.2, -100)
    labels[:, -1] = ids[:, -1]
    places = torch.arange(case.length)
    if case.mask in ("left", "right"):
        # Two tokens at least, so that one is predicted.
        pads = torch.randint(0, case.length - 1, (case.batch, 1), generator=generator)
        keep = places >= pads if case.mask == "left" else places < case.length - pads
        last = case.length - 1 - pads if case.mask == "right" else 0 * pads + case.length - 1
        labels = labels.scatter(1, last, ids.gather(1, last)).masked_fill(~keep, -100)
        return {"input_ids": ids, "labels": labels, "attention_mask": keep.long()}
    if case.mask == "packed":
        cut = int(torch.randint(1, case.length, (), generator=generator))
        positions = torch.where(places < cut, places, places - cut).expand(shape)
        return {"input_ids": ids, "labels": labels, "position_ids": positions.contiguous()}
    if case.mask == "whole":
        causal = torch.ones(case.length, case.length, dtype=torch.bool).tril()
        open_ = torch.rand(case.batch, 1, case.length, case.length, generator=generator) < 0.7
        seen = causal & (open_ | torch.eye(case.length, dtype=torch.bool))
        return {"input_ids": ids, "labels": labels, "attention_mask": seen}
    return {"input_ids": ids, "labels": labels}


def compare(case: Case) -> Report:
    """Loss, every gradient, and the logits of an evaluation."""
    report = Report(str(case), dist.get_rank())
    attn = "eager" if case.family == "gpt_oss" else "sdpa"
    model = tiny.build(case.family, seed=case.seed, attn=attn, **dict(case.config))
    torch.manual_seed(dist.get_rank())
    parallel = parallelize(copy.deepcopy(model), **dict(case.how))
    truth = tiny.reference(model)
    if case.checkpoint != "none":
        parallel.gradient_checkpointing_enable({"use_reentrant": case.checkpoint == "reentrant"})
    batch = make_batch(case, model.config.vocab_size)
    # Packed rows are found where there is no cache, which a checkpointed model does not make.
    want, got = (m(**fresh(batch), use_cache=False).loss for m in (truth, parallel))
    want.backward()
    got.backward()
    compare_loss(report, got, want)
    compare_gradients(report, gradients(parallel, report), gradients(truth))
    with evaluating(truth, parallel):
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        real = batch["attention_mask"].bool() if case.mask in ("left", "right") else ...
        logits = [whole(m(**inputs, use_cache=False).logits) for m in (truth, parallel)]
        report.compare("logits", logits[1][real], logits[0][real])
    return report
