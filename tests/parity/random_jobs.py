"""One random model, batch and set of switches against the unsharded model; rank functions."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.distributed as dist
from adapters import jobs as adapters
from harness import tiny
from harness.compare import compare_gradients, evaluating, fresh, gradients, whole
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
    attn: str = "sdpa"
    # Adapters: none, or made before or after `parallelize`.
    lora: str = ""


def make_batch(case: Case, config: Any, group: int) -> dict[str, Tensor]:
    """A group's ids, and what goes with the kind of mask; a label counts in each row."""
    generator = torch.Generator().manual_seed(case.seed + group)
    vocab = config.vocab_size
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
    if case.mask in ("whole", "heads"):
        heads = config.num_attention_heads if case.mask == "heads" else 1
        causal = torch.ones(case.length, case.length, dtype=torch.bool).tril()
        square = case.batch, heads, case.length, case.length
        seen = causal & (torch.rand(square, generator=generator) < 0.7)
        seen |= torch.eye(case.length, dtype=torch.bool)
        if case.attn == "eager":
            # Which adds it.
            seen = torch.zeros(square, dtype=torch.float64).masked_fill(~seen, -1e30)
        return {"input_ids": ids, "labels": labels, "attention_mask": seen}
    return {"input_ids": ids, "labels": labels}


def _pair(case: Case) -> tuple[Any, Any]:
    """The unsharded model as the judge, and the parallel one."""
    model: Any = tiny.build(case.family, seed=case.seed, attn=case.attn, **dict(case.config))
    plain = copy.deepcopy(model)
    # FSDP splits them where the linear is packed.
    lora = adapters.config(target_modules="all-linear", r=4)
    if case.lora:
        model = peft.get_peft_model(model, lora)
        adapters.fill(model)
        tiny.reference(model.get_base_model())
    else:
        tiny.reference(model)
    torch.manual_seed(dist.get_rank())
    if case.lora == "after":
        parallel = peft.get_peft_model(parallelize(plain, **dict(case.how)), lora)
        parallel.load_state_dict(model.state_dict())
    else:
        parallel = parallelize(copy.deepcopy(model), **dict(case.how))
    return model.train(), parallel.train()


def compare(case: Case) -> Report:
    """Loss, every gradient, and the logits of an evaluation; of groups, the mean of losses."""
    report = Report(str(case), dist.get_rank())
    truth, parallel = _pair(case)
    if case.checkpoint != "none":
        if case.lora and case.checkpoint == "reentrant":
            parallel.enable_input_require_grads()
        parallel.gradient_checkpointing_enable({"use_reentrant": case.checkpoint == "reentrant"})
    how = dict(case.how)
    data = how.get("dp_shard", 1)
    group = dist.get_rank() // (how["tp"] * how["cp"])
    # Packed rows are found where there is no cache, which a checkpointed model does not make.
    several = [make_batch(case, truth.config, one) for one in range(data)]
    want = [truth(**fresh(batch), use_cache=False).loss for batch in several]
    (sum(want) / data).backward()
    batch = several[group]
    output = parallel(**fresh(batch), use_cache=False)
    output.loss.backward()
    report.compare("loss", output.loss, want[group])
    compare_gradients(report, gradients(parallel, report), gradients(truth))
    if (output.logits is not None) != how["keep_logits"]:
        report.problems.append(f"logits: {type(output.logits)}")
    with evaluating(truth, parallel):
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        real = batch["attention_mask"].bool() if case.mask in ("left", "right") else ...
        logits = [whole(m(**inputs, use_cache=False).logits) for m in (truth, parallel)]
        report.compare("logits", logits[1][real], logits[0][real])
    return report
