"""Rank functions: LoRA on a parallelized model against LoRA on the unsharded one.

B is not zero from the start (at zero, A has no gradient and a lost sum does not show), two steps
with clipping active, every factor's gradient. Both orders: PEFT first, ``parallelize`` first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
import torch.distributed as dist
from harness import tiny
from harness.compare import attempt, check_contract, check_replicas
from harness.parity import Case, _around, _compare_runs, _run
from harness.report import Report
from torch import nn

from hf_sp import parallelize

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """A LoRA case: the parity case, the order and the LoraConfig's fields."""

    case: Case
    order: str = "before"
    config: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        fields = ",".join(f"{k}={v}" for k, v in self.config)
        return f"{self.case}-{self.order}-{fields}"


def config(**fields: Any) -> peft.LoraConfig:
    options = {"r": 3, "lora_alpha": 5, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**options, **fields})


def base(case: Case) -> nn.Module:
    return tiny.build(
        case.family, getattr(torch, case.dtype), case.seed, case.attn, **dict(case.model_kwargs)
    )


def judge(model: nn.Module) -> nn.Module:
    """The unsharded model with adapters, as the judge."""
    tiny.reference(model.get_base_model())
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int = 1) -> None:
    """Non-trivial values for all adapter weights of an unsharded model."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "magnitude" in name:
                p.mul_(1 + 0.1 * noise)
            elif "modules_to_save" in name:
                p.add_(0.1 * noise)
            else:
                p.copy_(noise / p.shape[1] ** 0.5)


def pair(lora: Lora) -> tuple[nn.Module, nn.Module]:
    """(unsharded, parallel), same weights, adapters on both."""
    case, fields = lora.case, dict(lora.config)
    plain = base(case)
    other = copy.deepcopy(plain)
    model = peft.get_peft_model(plain, config(**fields))
    fill(model)
    tp = dist.get_world_size()
    if lora.order == "before":
        parallel = parallelize(copy.deepcopy(model), tp=tp, sp=case.sp, **dict(case.parallelize))
    else:
        other = parallelize(other, tp=tp, sp=case.sp, **dict(case.parallelize))
        parallel = peft.get_peft_model(other, config(**fields))
        parallel.load_state_dict(model.state_dict())
    return judge(model).train(), parallel.train()


def train(lora: Lora) -> Report:
    """Two optimizer steps, parallel against unsharded."""
    case = lora.case
    report = Report(str(lora), dist.get_rank(), case.dtype)
    with contextlib.ExitStack() as stack:
        if dict(lora.config).get("lora_dropout"):
            stack.enter_context(same_masks(case.sp))
        model, parallel = pair(lora)
        check_contract(report, parallel, model)
        want = _run(model, replace(case, checkpoint="none"), None)
        stack.enter_context(_around(case))
        if case.checkpoint == "reentrant":
            parallel.enable_input_require_grads()
        got = _run(parallel, case, report)
    _compare_runs(report, got, want)
    check_replicas(report, parallel)
    adapters = [n for n in want.steps[0].gradients if "lora_" in n]
    if not adapters or any(not want.steps[0].gradients[n].any() for n in adapters):
        report.problems.append("a factor has no gradient: nothing is shown")
    return report


@contextlib.contextmanager
def same_masks(sp: bool) -> Iterator[None]:
    yield


def train_all(cases: Iterable[Lora]) -> list[Report]:
    return [attempt(str(one), lambda one=one: train(one)) for one in cases]
