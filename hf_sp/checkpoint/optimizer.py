"""Optimizer state of a parallel model: written as shards, read at the same or at another degree.

One torch.distributed.checkpoint (DCP) directory with the keys
``state.<parameter name>.<state name>`` and one JSON document, ``document``; and a stock optimizer
file of whole tensors is read too. Knows torch only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from hf_sp.checkpoint.packed import HALVES, packed_dims
from hf_sp.checkpoint.weights import listing
from hf_sp.comm.shard import merge_gate_up, shard_like, split_gate_up, with_local
from hf_sp.errors import CheckpointError
from hf_sp.state import parallel_state

OPTIMIZER_DIRECTORY = "optimizer_dcp"
"""Name of the optimizer's directory inside a checkpoint folder."""

_VERSION = 1


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    # accelerate's AcceleratedOptimizer keeps the real one under this public name.
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    foreign = sum(id(p) not in names for g in optimizer.param_groups for p in g["params"])
    if foreign:
        raise CheckpointError(
            "the optimizer holds parameters that are not the model's",
            got=f"{foreign} of them",
            rule="optimizer state is written under the names of the model's parameters",
            remedy="make the optimizer after parallelize(model)",
        )
    return [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1 and not isinstance(value, DTensor):
        return {"tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot write a value of type {type(value).__name__}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, dict) and "tuple" in value:
        return tuple(_decode(v) for v in value["tuple"])
    if isinstance(value, dict):
        return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))
    return value


def save_optimizer(model: nn.Module, optimizer: Any, directory: str | Path) -> None:
    """Write optimizer state to a DCP directory. To be called on every rank.

    Args:
        model: the model whose parameter names the state is written under.
        optimizer: its optimizer; wrappers are looked through.
        directory: where to write; made if need be.

    Raises:
        CheckpointError: the optimizer keeps state that cannot be written for any degree: a tensor
            of the shard's shape that is not a DTensor (it would be read back as another rank's).
    """
    optimizer = _unwrapped(optimizer)
    groups = _group_names(model, optimizer)
    parameters = dict(model.named_parameters())
    packed = packed_dims(model)
    tensors: dict[str, Any] = {}
    scalars: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name in (n for g in groups for n in g):
        parameter = parameters[name]
        for key, value in optimizer.state.get(parameter, {}).items():
            sharded = (
                isinstance(parameter, DTensor) and parameter.to_local().shape != parameter.shape
            )
            if isinstance(value, Tensor):
                if sharded and value.numel() > 1 and not isinstance(value, DTensor):
                    problems.append(f"{name}.{key}: a plain tensor {tuple(value.shape)}")
                if name in packed and value.shape == parameter.shape:
                    parts = split_gate_up(value.detach(), packed[name])
                    for half, part in zip(HALVES, parts, strict=True):
                        tensors[f"state.{name}.{key}/{half}"] = part
                else:
                    tensors[f"state.{name}.{key}"] = value.detach()
                continue
            try:
                scalars.setdefault(name, {})[key] = _encode(value)
            except TypeError as error:
                problems.append(f"{name}.{key}: {error}")
    document: dict[str, Any] = {"version": _VERSION, "scalars": scalars, "groups": []}
    for names, group in zip(groups, optimizer.param_groups, strict=True):
        options = {}
        for key, value in group.items():
            if key == "params":
                continue
            try:
                options[key] = _encode(value)
            except TypeError as error:
                problems.append(f"param_groups[{len(document['groups'])}].{key}: {error}")
        document["groups"].append({"names": names, "options": options})
    state = parallel_state(model)
    if state is not None and state.everyone.size > 1:
        # A shard can have the whole's shape on one rank only; all ranks have to agree to refuse.
        told: list[Any] = [None] * state.everyone.size
        dist.all_gather_object(told, problems, group=state.all_ranks)
        problems = sorted({p for rank in told for p in rank})
    if problems:
        raise CheckpointError(
            "the optimizer's state cannot be saved",
            where=type(optimizer).__name__,
            got=listing(problems),
            rule="the state of a sharded parameter is a DTensor, a single number or plain data",
            remedy="save the weights alone (Trainer: save_only_model=True), or take an optimizer "
            "of torch.optim",
        )
    tensors["document"] = json.dumps(document)
    Path(directory).mkdir(parents=True, exist_ok=True)
    dcp_save(tensors, checkpoint_id=str(directory), no_dist=not dist.is_initialized())


def _of_state(key: str) -> tuple[str, str]:
    """``state.<parameter name>.<state name>`` in two; the state's name has no dot."""
    name, _, entry = key.removeprefix("state.").rpartition(".")
    return name, entry


def load_optimizer(model: nn.Module, optimizer: Any, directory: str | Path) -> None:
    """Read what ``save_optimizer`` wrote, at any degree. To be called on every rank.

    Raises:
        CheckpointError: other parameters, parameter groups or shapes than the optimizer's.
    """
    optimizer = _unwrapped(optimizer)
    directory = Path(directory)
    groups = _group_names(model, optimizer)
    parameters = dict(model.named_parameters())
    no_dist = not dist.is_initialized()
    reader = FileSystemReader(str(directory))
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except (OSError, EOFError) as error:
        raise CheckpointError(
            "the optimizer's state cannot be read",
            where=str(directory),
            got=f"{type(error).__name__}: {error}",
            rule="the directory holds what save_optimizer wrote, whole",
        ) from error
    found: dict[str, Any] = {"document": ""}
    dcp_load(found, checkpoint_id=str(directory), no_dist=no_dist)
    document = json.loads(found["document"])
    _same_groups([g["names"] for g in document["groups"]], groups, directory)

    packed = packed_dims(model)
    templates: dict[str, Any] = {}
    wrong: list[str] = []
    for key, item in metadata.items():
        name, entry = _of_state(key)
        if name not in parameters:
            continue
        assert isinstance(item, TensorStorageMetadata)
        parameter: Tensor = parameters[name]
        dtype = item.properties.dtype
        if entry.endswith(tuple(f"/{half}" for half in HALVES)) and name in packed:
            parameter = split_gate_up(parameter.detach(), packed[name])[0]
        if item.size == parameter.shape and isinstance(parameter, DTensor):
            local = torch.zeros_like(parameter.to_local(), dtype=dtype)
            templates[key] = with_local(local, parameter)
        elif item.size == parameter.shape or item.size.numel() == 1:
            templates[key] = torch.zeros(item.size, dtype=dtype)
        else:
            wrong.append(f"{key}: {tuple(item.size)}, the parameter is {tuple(parameter.shape)}")
    if wrong:
        raise _misfit(wrong, directory)
    dcp_load(templates, checkpoint_id=str(directory), no_dist=no_dist)

    entries: dict[str, dict[str, Any]] = {}
    for key in list(templates):
        if key not in templates:
            continue  # the other half of one that is merged
        name, entry = _of_state(key)
        whole, _, half = key.rpartition("/")
        if name in packed and half in HALVES:
            gate, up = (templates.pop(f"{whole}/{h}") for h in HALVES)
            value = merge_gate_up(gate, up, packed[name], parameters[name])
            entry = entry.removesuffix(f"/{half}")
        else:
            value = templates[key]
        entries.setdefault(name, {})[entry] = value

    order = [n for g in groups for n in g]
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(order):
        scalars = document["scalars"].get(name, {})
        known = entries.get(name, {}) | {k: _decode(v) for k, v in scalars.items()}
        if known:
            state[index] = known
    _put(optimizer, state, [_options(g["options"]) for g in document["groups"]])


def load_full_optimizer(model: nn.Module, optimizer: Any, full: Mapping[str, Any]) -> None:
    """Give every rank its part of a one-process ``optimizer.state_dict()``.

    Parameters are known by their place in the groups there, as torch keeps no names: the groups
    must be those of this optimizer.

    Raises:
        CheckpointError: other groups or shapes; nothing is loaded then.
    """
    optimizer = _unwrapped(optimizer)
    groups = _group_names(model, optimizer)
    parameters = dict(model.named_parameters())
    sizes = [len(g["params"]) for g in full["param_groups"]]
    if sizes != [len(g) for g in groups]:
        raise _misfit(
            [f"parameter groups of {sizes} parameters, here {[len(g) for g in groups]}"],
            "optimizer.pt",
        )
    order = [n for g in groups for n in g]
    saved_order = [i for g in full["param_groups"] for i in g["params"]]
    state: dict[int, dict[str, Any]] = {}
    wrong: list[str] = []
    for index, (name, saved) in enumerate(zip(order, saved_order, strict=True)):
        parameter = parameters[name]
        entry: dict[str, Any] = {}
        for key, value in full["state"].get(saved, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim():
                is_dtensor = isinstance(parameter, DTensor)
                entry[key] = shard_like(value, parameter) if is_dtensor else value  # type: ignore[arg-type]
            elif isinstance(value, Tensor) and value.numel() > 1:
                wrong.append(
                    f"{name}.{key}: {tuple(value.shape)}, the parameter is {tuple(parameter.shape)}"
                )
            else:
                entry[key] = value
        if entry:
            state[index] = entry
    if wrong:
        raise _misfit(wrong, "optimizer.pt")
    options = [{k: v for k, v in g.items() if k != "params"} for g in full["param_groups"]]
    _put(optimizer, state, options)


def _options(encoded: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _decode(v) for k, v in encoded.items()}


def _put(
    optimizer: torch.optim.Optimizer,
    state: dict[int, dict[str, Any]],
    options: list[dict[str, Any]],
) -> None:
    numbered, start = [], 0
    for group, chosen in zip(optimizer.param_groups, options, strict=True):
        end = start + len(group["params"])
        numbered.append({**chosen, "params": list(range(start, end))})
        start = end
    optimizer.load_state_dict({"state": state, "param_groups": numbered})


def _same_groups(saved: list[list[str]], here: list[list[str]], where: str | Path) -> None:
    if [sorted(g) for g in saved] == [sorted(g) for g in here] and saved == here:
        return
    lines = []
    if len(saved) != len(here):
        lines.append(f"{len(saved)} parameter groups, here {len(here)}")
    old, new = {n for g in saved for n in g}, {n for g in here for n in g}
    lines += [f"{n}: in the checkpoint only" for n in sorted(old - new)]
    lines += [f"{n}: in the optimizer only" for n in sorted(new - old)]
    raise _misfit(lines or ["the same parameters in other groups or another order"], where)


def _misfit(lines: Iterable[str], where: str | Path) -> CheckpointError:
    return CheckpointError(
        "the optimizer's state in the checkpoint does not fit this optimizer",
        where=str(where),
        got=listing(lines),
        rule="the same parameters, in the same groups, of the same shapes",
        remedy="resume with the model, the trainable parameters and the optimizer of the run "
        "that saved it, or start a new run from its weights",
    )
