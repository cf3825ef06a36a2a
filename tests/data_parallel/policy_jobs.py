"""Rank functions: FSDP2's mixed precision and offloading, as options of ``parallelize``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest import mock

import peft
import torch
import torch.distributed as dist
from harness import batches, tiny
from harness.compare import attempt, evaluating, fresh, gather_objects
from harness.parity import Case, around, pair
from harness.report import Report
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sp import from_pretrained, parallelize
from hf_sp.errors import HfSpError
from hf_sp.model import fsdp


class Offload(CPUOffloadPolicy):
    """One that a job's key can have in it."""

    def __hash__(self) -> int:
        return hash(self.pin_memory)


OFFLOAD = Offload(pin_memory=False)
HALF = MixedPrecisionPolicy(torch.bfloat16, torch.float32)


class Sent(TorchDispatchMode):
    """Bytes an element of what FSDP gathers, and of what it reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[str, set[int]] = {
            "_allgather_base_": set(),
            "_reduce_scatter_base_": set(),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = str(func).split(".")[1]
        if str(func).startswith("c10d.") and kind in self.sizes:
            self.sizes[kind].add(args[1].element_size())
        return func(*args, **(kwargs or {}))


def reach_all(cases: Iterable[Case]) -> list[Report]:
    """`reach` for each case."""
    return [attempt(str(case), lambda case=case: reach(case)) for case in cases]


def reach(case: Case) -> Report:
    """Every group of FSDP's is given the policies, late adapters' too, and sends what they say."""
    report = Report(str(case), dist.get_rank(), "float32")
    given: list[dict[str, Any]] = []

    def watched(module: Any, **kwargs: Any) -> Any:
        given.append(kwargs)
        return fully_shard(module, **kwargs)

    with around(case), mock.patch.object(fsdp, "fully_shard", watched):
        _, model = pair(case)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
        with Sent() as sent:
            model(**batches.plain(2, 17, seed=case.group)).loss.backward()
    options = dict(case.parallelize)

    def number(what: str, got: float, want: float) -> None:
        report.compare(what, torch.tensor(float(got)), torch.tensor(float(want)))

    # Two layers, what is around them, and two blocks of each layer.
    number("groups", len(given), 7)
    number("offloaded", sum(one["offload_policy"] == options["offload_policy"] for one in given), 7)
    for kind, size in (("_allgather_base_", 2), ("_reduce_scatter_base_", 4)):
        report.problems += [] if sent.sizes[kind] else [f"no {kind}"]
        number(kind, max(sent.sizes[kind], default=0), size)
    return report


def evaluates(case: Case) -> Report:
    """A first forward in inference mode, then training; and logits in the dtype of the output."""
    report = Report(str(case), dist.get_rank(), case.dtype)
    _, parallel = pair(case)
    batch = batches.plain(2, 17, seed=case.group)
    with evaluating(parallel), torch.inference_mode():
        logits = parallel(input_ids=batch["input_ids"]).logits
    loss = parallel(**fresh(batch)).loss
    loss.backward()
    policy = dict(case.parallelize)["mp_policy"]
    dtypes = {"logits": logits.dtype, "loss": loss.dtype}
    report.problems += [f"{n} in {t}" for n, t in dtypes.items() if t != policy.output_dtype]
    kept = {p.dtype for p in parallel.parameters()} | {p.grad.dtype for p in parallel.parameters()}
    report.problems += [] if kept == {torch.float32} else [f"weights and gradients in {kept}"]
    report.compare("loss", loss, loss.clone())
    return report


def loads(folder: str) -> list[str]:
    """Read shard by shard with both policies, it is what ``parallelize`` makes."""
    dist.barrier()
    if dist.get_rank() == 0:
        tiny.build("llama", torch.float32).save_pretrained(folder)
    dist.barrier()
    options = {"tp": 2, "dp_shard": 2, "mp_policy": HALF, "offload_policy": OFFLOAD}
    made = []
    for model in (
        from_pretrained(folder, **options).train(),
        parallelize(tiny.build("llama", torch.float32), **options),
    ):
        loss = model(**batches.plain(2, 17)).loss
        loss.backward()
        made.append([loss, *(p.grad.to_local() for p in model.parameters())])
    return [str(i) for i, (a, b) in enumerate(zip(*made, strict=True)) if not torch.equal(a, b)]


def refuse(family: str = "llama", **kwargs: Any) -> tuple[str, bool]:
    """What ``parallelize`` says to policies, and whether the model is as it was."""
    model = tiny.build(family, torch.float32)
    before = dict(model.named_parameters())
    try:
        parallelize(model, **kwargs)
    except HfSpError as error:
        message = f"{type(error).__name__}: {error}"
    else:
        message = ""
    same = all(p is before[name] for name, p in model.named_parameters())
    assert len(set(gather_objects(message))) == 1
    return message, same
