"""What ``parallelize`` refuses before it touches the model, on all ranks alike."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hf_sp.comm.degrees import launched_world, spans_world
from hf_sp.comm.mesh import start_distributed
from hf_sp.comm.watch import TIMES, seconds
from hf_sp.errors import ConfigError, HfSpError
from hf_sp.plan.exchange import Exchange
from hf_sp.state import parallel_state


def check_arguments(
    sizes: dict[str, int | None],
    switches: Mapping[str, object],
    choices: Mapping[str, tuple[str | None, tuple[str | None, ...]]],
) -> None:
    """Refuse arguments of a wrong type or value.

    Args:
        sizes: positive integers; ``tp``, ``dp_shard`` and ``cp_ulysses`` may be None.
        switches: on or off.
        choices: a value and what it may be.
    """
    problems = []
    for name, size in sizes.items():
        absent = size is None and name in ("tp", "dp_shard", "cp_ulysses")
        if not absent and (type(size) is not int or size < 1):
            problems.append((f"{name} must be a positive integer", f"{name}={size!r}", "1, 2, ..."))
    for name, flag in switches.items():
        if not isinstance(flag, bool):
            legal = f"{name} is True or False"
            problems.append((f"{name} is a switch, not a degree", f"{name}={flag!r}", legal))
    for name, (value, known) in choices.items():
        if value not in known:
            problems.append((f"unknown {name}", repr(value), ", ".join(map(repr, known))))
    if problems:
        what, got, legal = problems[0]
        raise ConfigError(what, got=got, legal=legal)


def check_environment() -> None:
    """Refuse what later could only be met in the middle of a run."""
    for variable in TIMES:
        seconds(variable)


def check_other_sequence_parallelism() -> None:
    """Refuse a launcher that means another kind of sequence parallelism than ours."""
    if (size := _announced("PARALLELISM_CONFIG_SP_SIZE")) > 1:
        raise ConfigError(
            "accelerate's sp_size is not Megatron's sequence parallelism",
            where="PARALLELISM_CONFIG_SP_SIZE (parallelism_config_sp_size in the YAML)",
            got=str(size),
            rule="sp_size means DeepSpeed Ulysses: it divides the batch over ranks of its own",
            remedy="set parallelism_config_tp_size instead, and parallelize(model, sp=True)",
        )
    if (size := _announced("PARALLELISM_CONFIG_CP_SIZE")) > 1:
        raise ConfigError(
            "accelerate's cp_size is torch's own context parallelism",
            where="PARALLELISM_CONFIG_CP_SIZE (parallelism_config_cp_size in the YAML)",
            got=str(size),
            rule="accelerate takes it with its FSDP plugin alone, which would shard a model again",
            remedy=f"leave it out, and parallelize(model, cp={size})",
        )


def check_exchange(mode: str | None, ulysses: int | None, node: int) -> Exchange:
    """How context parallel ranks were asked to attend; refuses a split of what is not split."""
    if ulysses is not None and mode != "hybrid":
        raise ConfigError(
            "cp_ulysses splits the ranks of a hybrid",
            got=f"cp_ulysses={ulysses}, cp_mode={mode!r}",
            legal="cp_mode='hybrid', or cp_ulysses=None",
        )
    return Exchange(mode, ulysses, node)


def _announced(name: str) -> int:
    size = os.environ.get(name, "")
    return int(size) if size.isdigit() else 1


def check_model(model: nn.Module) -> None:
    """Refuse what is no whole, plain, unwrapped transformers model."""
    if not isinstance(model, nn.Module):
        raise ConfigError("parallelize takes a model", got=type(model).__name__)
    name = type(model).__name__
    if parallel_state(model) is not None:
        raise ConfigError(
            f"{name} is parallelized already",
            rule="parallelize is called once per model",
            remedy="to change tp, build the model again",
        )
    for attribute in ("config", "get_input_embeddings", "get_output_embeddings"):
        if not hasattr(model, attribute):
            raise ConfigError(
                f"{name} is not a transformers model",
                where=f"{name}.{attribute}",
                rule="hf_sp reads the plan, the config and the embeddings of a PreTrainedModel",
                remedy="pass the model itself, before it is wrapped (DDP, FSDP, compile)",
            )
    quantizer = getattr(model, "hf_quantizer", None)
    packed = next((n for n, p in model.named_parameters() if _is_packed(p)), None)
    if quantizer is not None or getattr(model, "is_quantized", False) or packed:
        raise ConfigError(
            f"{name} has quantised weights",
            where=packed or "",
            got=type(quantizer).__name__ if packed is None else "packed storage",
            rule="packed weights cannot be cut into shards (QLoRA: not in this release)",
            remedy="load the model in bf16; tp already divides its weights over the ranks",
        )
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    dispatched = len(devices) > 1 or devices & {"disk", "cpu"}
    if dispatched or getattr(model, "_hf_hook", None) is not None:
        how = "is dispatched by device_map" if dispatched else "carries accelerate's dispatch hooks"
        raise ConfigError(
            f"{name} {how}",
            got=", ".join(sorted(devices)),
            rule="every rank needs the whole model on one device; hf_sp places the shards",
            remedy="load it without device_map and without cpu_offload",
        )
    sharded = next((n for n, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        raise ConfigError(
            f"{name} is sharded already",
            where=sharded,
            rule="parallelize takes whole parameters",
            remedy="load it without DistributedConfig and before FSDP",
        )


def _is_packed(p: nn.Parameter) -> bool:
    """Whether a parameter's storage is not its values: bitsandbytes', torchao's."""
    other = type(p.data).__module__.partition(".")[0] not in ("torch", "hf_sp")
    return other or not (p.is_floating_point() or p.is_complex())


def check_devices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Refuse a model on an accelerator that the process group cannot reach."""
    away = {p.device.type for p in model.parameters()} - {"cpu", "meta", mesh.device_type}
    if away:
        raise ConfigError(
            f"the model is on {away.pop()}, the process group is not",
            got=f"a mesh on {mesh.device_type}, backend {dist.get_backend(mesh.get_group())}",
            rule="shards live where their collectives run; hf_sp does not move a model to the CPU",
            remedy="start torch.distributed with NCCL, or leave it to parallelize",
        )


def check_optimizers(model: nn.Module) -> None:
    """Refuse if an optimizer or a gradient already refers to the whole parameters.

    No parameter knows its optimizers: only the collector's list of all objects does.
    """
    graded = next((n for n, p in model.named_parameters() if p.grad is not None), None)
    if graded is not None:
        raise ConfigError(
            "the model has gradients of its whole parameters",
            where=f"{graded}.grad",
            rule="parallelize replaces the parameters; these gradients would be lost",
            remedy="parallelize first, or call model.zero_grad() if they are not needed",
        )
    names = {id(p): n for n, p in model.named_parameters()}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.optim.Optimizer):
            continue
        groups = getattr(thing, "param_groups", [])
        held = [names[id(p)] for group in groups for p in group["params"] if id(p) in names]
        if held:
            raise ConfigError(
                "an optimizer was built on the whole parameters",
                where=f"{type(thing).__name__} holds {held[0]}",
                rule="parallelize replaces the parameters; that optimizer would train nothing",
                remedy="call parallelize before the optimizer and the Trainer are made",
            )


def describe_tensors(model: Any) -> dict[str, str]:
    """What every rank's parameters and buffers have to share before they are compared by value."""
    if not isinstance(model, nn.Module):
        return {}
    return {
        name: f"{tuple(t.shape)} {t.dtype} requires_grad={t.requires_grad}"
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    }


def agree(
    mesh: DeviceMesh | None,
    problem: HfSpError | None,
    settings: dict[str, str],
    what: str = "the ranks were asked for different things",
    rule: str = "every rank calls parallelize with the same model and arguments",
) -> None:
    """Raise on every rank if one refuses, or if they were asked for different things.

    Collectives: 1 all-gather of a text over the ranks (none in a world of one).

    Raises:
        HfSpError: this rank's own problem, or a ConfigError that quotes the other's.
    """
    alone = launched_world() == 1 if mesh is None else mesh.size() == 1
    everyone: list[Any] = []
    if not alone and (mesh is None or "tp" in (mesh.mesh_dim_names or ())):
        start_distributed()
        group = None if mesh is None or spans_world(mesh) else mesh.get_group("tp")
        if dist.get_backend(group) != "fake":
            everyone = [None] * dist.get_world_size(group)
            dist.all_gather_object(everyone, (problem and str(problem), settings), group=group)
    if problem is not None:
        raise problem
    for rank, (message, _) in enumerate(everyone):
        if message is not None:
            raise ConfigError(f"rank {rank} refused", got=message)
    told = [settings for _, settings in everyone]
    different = [n for n in dict.fromkeys(n for one in told for n in one) if _values(told, n)[1:]]
    if different:
        name, values = different[0], _values(told, different[0])
        raise ConfigError(
            what,
            where=name if len(different) == 1 else f"{name}, and {len(different) - 1} more",
            got="\n".join(f"rank {r}: {text.splitlines()[0]}" for text, r in values),
            rule=rule,
        )


def _values(told: list[dict[str, str]], name: str) -> list[tuple[str, str]]:
    """The values that a setting has, each with the ranks that have it."""
    ranks: dict[str, list[str]] = {}
    for rank, settings in enumerate(told):
        ranks.setdefault(settings.get(name, "missing"), []).append(str(rank))
    return [(value, ", ".join(having)) for value, having in ranks.items()]
