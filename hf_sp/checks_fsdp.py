"""What ``parallelize`` refuses of data parallel groups: what FSDP2 cannot take or keep."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from hf_sp.comm.degrees import Degrees
from hf_sp.errors import ConfigError
from hf_sp.plan import Plan

_DTYPES = (None, torch.bfloat16, torch.float32, torch.float64)


def check_policies(mp_policy: object, offload_policy: object, degrees: Degrees, ep: int) -> None:
    """Refuse policies that FSDP2 does not know, that do not train, or that it cannot keep."""
    kinds = {"mp_policy": MixedPrecisionPolicy, "offload_policy": OffloadPolicy}
    policies = {"mp_policy": mp_policy, "offload_policy": offload_policy}
    given = {name: policy for name, policy in policies.items() if policy is not None}
    for name, policy in given.items():
        if not isinstance(policy, kinds[name]):
            legal = f"a torch.distributed.fsdp.{kinds[name].__name__}, or None"
            raise ConfigError(f"{name} is a policy of FSDP2", got=f"{name}={policy!r}", legal=legal)
    if given and degrees.fsdp == 1:
        raise ConfigError(
            f"{' and '.join(given)} without data parallel groups",
            got=str(degrees),
            rule="these are FSDP's, which shards weights over the groups",
            remedy="parallelize(..., dp_shard=2); else a model in bfloat16, or one in float32 with "
            "TrainingArguments(bf16=True)",
        )
    if given and ep > degrees.tp:
        raise ConfigError(
            f"{' and '.join(given)} with experts that are split over the groups",
            got=f"ep={ep}, {degrees}",
            rule="FSDP leaves these experts alone: they would keep their dtype and place",
            legal=" or ".join(f"ep={n}" for n in sorted({1, degrees.tp})),
        )
    for name in ("param_dtype", "reduce_dtype", "output_dtype"):
        if getattr(mp_policy, name, None) not in _DTYPES:
            raise ConfigError(
                "FSDP's mixed precision is not offered in this dtype",
                where=f"mp_policy.{name}",
                got=str(getattr(mp_policy, name)),
                rule="gradients in float16 underflow without a scaler, and FSDP2 has none",
                legal=", ".join(map(str, _DTYPES)),
            )
    pinned = isinstance(offload_policy, CPUOffloadPolicy) and offload_policy.pin_memory
    if pinned and not torch.accelerator.is_available():
        raise ConfigError(
            "memory cannot be pinned without a GPU",
            where="offload_policy",
            got=str(offload_policy),
            rule="pinned memory is what a GPU copies from",
            remedy="CPUOffloadPolicy(pin_memory=False)",
        )


def check_backends(offload_policy: OffloadPolicy | None) -> None:
    """Refuse to keep parameters where the process group, by now running, cannot reduce."""
    backends = dist.get_backend_config()
    if isinstance(offload_policy, CPUOffloadPolicy) and "cpu:" not in backends:
        raise ConfigError(
            "the process group cannot reach what waits on the CPU",
            got=f"backends {backends}",
            rule="norms are summed and checkpoints gathered where CPUOffloadPolicy has the parts",
            remedy="torch.distributed.init_process_group('cpu:gloo,cuda:nccl') before anything",
        )


def check_packed(where: str, width: int, degrees: Degrees, biased: bool = False) -> None:
    """Refuse a packed linear, or an adapter's factor of one, whose inputs FSDP cannot split."""
    if biased or width % (degrees.dp_shard * degrees.cp):
        raise ConfigError(
            "a packed linear cannot be sharded over data parallel ranks",
            where=where,
            got=f"{width} input features, " + ("with a bias" if biased else "no bias"),
            rule="tp splits its output features, FSDP its input features (of a LoRA factor, r of "
            "them), evenly",
            legal="dp_shard * cp that divides these, and no bias",
        )


def check_data_parallel(model: nn.Module, plan: Plan, degrees: Degrees) -> None:
    """Refuse what FSDP cannot take, or would not find."""
    if degrees.fsdp == 1:
        return
    experts = [b.experts.path + "." for b in plan.blocks if b.experts is not None]
    alone = tuple(experts) if plan.ep > plan.tp else ()
    seen: dict[str, tuple[str, torch.dtype]] = {}
    # Paths of the plan are the transformers model's.
    base = getattr(model, "get_base_model", lambda: model)()
    names = {name for name, _ in base.named_parameters()}
    for leaf in (leaf for block in plan.blocks for leaf in block.leaves if leaf.style == "packed"):
        # An adapter holds the linear inside.
        biased = {f"{leaf.path}.bias", f"{leaf.path}.base_layer.bias"} & names
        check_packed(leaf.path, leaf.shape[1], degrees, bool(biased))
        for name, p in base.named_parameters():
            if name.startswith(f"{leaf.path}.lora_B."):
                check_packed(name, p.shape[1], degrees)
    for name, p in base.named_parameters():
        if name.startswith(alone) or not p.requires_grad:
            continue
        layer = next((path for path in plan.layers if name.startswith(path + ".")), "")
        first, dtype = seen.setdefault(layer, (name, p.dtype))
        if p.dtype != dtype:
            raise ConfigError(
                "trained weights of one FSDP group have different dtypes",
                where=f"{first}\n{name}",
                got=f"{dtype} and {p.dtype}",
                rule="FSDP reduces a layer's gradients, and those of what surrounds, in one buffer",
                remedy="model.to(torch.bfloat16), float32 under autocast, or freeze the odd ones",
            )
