"""Optimizer state of a parallel model: written as shards, read at the same or at another degree.

A folder of ``hf_sp.checkpoint.shards`` with the keys ``<parameter name>.<state name>``; and a stock
optimizer file of whole tensors is read too. Knows torch only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sp.checkpoint.background import Writing
from hf_sp.checkpoint.folder import about, check, replacing
from hf_sp.checkpoint.packed import packed_dims
from hf_sp.checkpoint.ranks import Together, listing, ranks_of
from hf_sp.checkpoint.shards import Shards, dtype_of, save_shards
from hf_sp.comm.shard import shard_like
from hf_sp.errors import CheckpointError

OPTIMIZER_DIRECTORY = "optimizer_shards"
"""Name of the optimizer's directory inside a checkpoint folder."""


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


def _encoded(values: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    """Plain data that JSON holds; what is none becomes a problem."""

    def encode(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() <= 1 and not isinstance(value, DTensor):
            return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, tuple):
            return {"tuple": [encode(v) for v in value]}
        if isinstance(value, list):
            return [encode(v) for v in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        problems.append(f"{where}.{key}: cannot write a value of type {type(value).__name__}")
        return None

    key, found = "", {}
    for key, value in values.items():
        found[key] = encode(value)
    return found


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if isinstance(value, dict) and "tuple" in value:
        return tuple(_decode(v) for v in value["tuple"])
    if isinstance(value, dict):
        return torch.tensor(value["tensor"], dtype=dtype_of(value["dtype"]))
    return value


def save_optimizer(model: nn.Module, optimizer: Any, directory: str | Path) -> None:
    """Write optimizer state, in place of what was there when all of it is. On every rank.

    Args:
        model: the model whose parameter names the state is written under.
        optimizer: its optimizer; wrappers are looked through.
        directory: where to write; made if need be.

    Raises:
        CheckpointError: the optimizer keeps state that cannot be written for any degree: a tensor
            of the shard's shape that is not a DTensor (it would be read back as another rank's);
            or a rank could not write. What was in the directory is untouched then.
    """
    with replacing(directory, ranks_of(model), about(model)) as aside:
        write_optimizer(model, optimizer, aside)


def write_optimizer(
    model: nn.Module, optimizer: Any, directory: Path, writing: Writing | None = None
) -> None:
    """``save_optimizer`` into a folder that is put in place as a whole, perhaps later."""
    optimizer = _unwrapped(optimizer)
    groups = _group_names(model, optimizer)
    parameters = dict(model.named_parameters())
    packed = packed_dims(model)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name in (n for g in groups for n in g):
        p = parameters[name]
        sharded = isinstance(p, DTensor) and p.to_local().shape != p.shape
        plain = {}
        for key, value in optimizer.state.get(p, {}).items():
            if not isinstance(value, Tensor) or (
                value.numel() <= 1 and not isinstance(value, DTensor)
            ):
                plain[key] = value
            elif sharded and not isinstance(value, DTensor):
                problems.append(f"{name}.{key}: a plain tensor {tuple(value.shape)}")
            else:
                tensors[f"{name}.{key}"] = value
        scalars[name] = _encoded(plain, name, problems)
    described = []
    for number, (names, group) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        options = {k: v for k, v in group.items() if k != "params"}
        options = _encoded(options, f"param_groups[{number}]", problems)
        described.append({"names": names, "options": options})
    # A shard can have the whole's shape on one rank only; all ranks have to agree to refuse.
    ranks = ranks_of(model)
    problems = sorted({p for told in ranks.gather(problems) for p in told})
    if problems:
        raise CheckpointError(
            "the optimizer's state cannot be saved",
            where=type(optimizer).__name__,
            got=listing(problems),
            rule="the state of a sharded parameter is a DTensor, a single number or plain data",
            remedy="save the weights alone (Trainer: save_only_model=True), or take an optimizer "
            "of torch.optim",
        )
    halved = {k: packed[n] for k in tensors if (n := k.rpartition(".")[0]) in packed}
    more, later = {"scalars": scalars, "groups": described}, writing.jobs if writing else None
    save_shards(tensors, halved, directory, ranks, more, later)


def load_optimizer(model: nn.Module, optimizer: Any, directory: str | Path) -> None:
    """Read what ``save_optimizer`` wrote, at any degree. To be called on every rank.

    Raises:
        CheckpointError: files are missing or changed; other parameters, parameter groups or shapes
            than the optimizer's. The optimizer is untouched then.
    """
    check(directory, ranks_of(model))
    read_optimizer(model, optimizer, Path(directory))


def read_optimizer(model: nn.Module, optimizer: Any, directory: Path) -> None:
    """``load_optimizer`` from a folder that has been checked as a whole."""
    groups = _group_names(model, _unwrapped(optimizer))
    shards = Shards(directory)
    _same_groups([g["names"] for g in shards.index["groups"]], groups, directory)
    likes = dict(model.named_parameters())
    pairs = [(key, shape, likes[key.rpartition(".")[0]]) for key, shape in shards.shapes.items()]
    wrong = [_sizes(key, shape, p) for key, shape, p in pairs if shape != p.shape]
    if wrong:
        raise _misfit(wrong, directory)
    with Together(ranks_of(model), "the optimizer's state cannot be read", directory):
        saved = stock_state(shards, likes, packed_dims(model))
    _unwrapped(optimizer).load_state_dict(saved)


def stock_state(
    shards: Shards, likes: Mapping[str, Tensor], packed: Mapping[str, int]
) -> dict[str, Any]:
    """An ``optimizer.state_dict()`` of saved shards, each tensor laid out as its parameter.

    Args:
        shards: the saved state.
        likes: parameters by name, or tensors of their shapes.
        packed: names of packed parameters -> the dim that holds their parts.
    """
    names = [n for g in shards.index["groups"] for n in g["names"]]
    entries = {
        name: {k: _decode(v) for k, v in shards.index["scalars"][name].items()} for name in names
    }
    for key in shards.shapes:
        name, _, entry = key.rpartition(".")
        entries[name][entry] = shards.read(key, likes[name], packed.get(name))
    groups, start = [], 0
    for group in shards.index["groups"]:
        end = start + len(group["names"])
        options = {k: _decode(v) for k, v in group["options"].items()}
        groups.append({**options, "params": list(range(start, end))})
        start = end
    return {
        "state": {i: entries[n] for i, n in enumerate(names) if entries[n]},
        "param_groups": groups,
    }


def load_full_optimizer(model: nn.Module, optimizer: Any, full: Mapping[str, Any]) -> None:
    """Give every rank its part of a one-process ``optimizer.state_dict()``.

    Parameters are known by their place in the groups there, as torch keeps no names: the groups
    must be those of this optimizer.

    Raises:
        CheckpointError: other groups or shapes; nothing is loaded then.
    """
    groups = _group_names(model, _unwrapped(optimizer))
    parameters = dict(model.named_parameters())
    sizes, here = [len(g["params"]) for g in full["param_groups"]], [len(g) for g in groups]
    wrong = [f"parameter groups of {sizes} parameters, here {here}"] if sizes != here else []
    state: dict[int, dict[str, Any]] = {}
    numbers = [i for g in full["param_groups"] for i in g["params"]]
    for number, name in zip(numbers, (n for g in groups for n in g), strict=False):
        p = parameters[name]
        for key, value in full["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape == p.shape:
                value = shard_like(value, p) if isinstance(p, DTensor) else value
            elif isinstance(value, Tensor) and value.numel() > 1:
                wrong.append(_sizes(f"{name}.{key}", value.shape, p))
            state.setdefault(number, {})[key] = value
    if wrong:
        raise _misfit(wrong, "optimizer.pt")
    _unwrapped(optimizer).load_state_dict({"state": state, "param_groups": full["param_groups"]})


def _same_groups(saved: list[list[str]], here: list[list[str]], where: str | Path) -> None:
    old, new = {n for g in saved for n in g}, {n for g in here for n in g}
    lines = [f"{len(saved)} parameter groups, here {len(here)}"] * (len(saved) != len(here))
    lines += [f"{n}: in the checkpoint only" for n in sorted(old - new)]
    lines += [f"{n}: in the optimizer only" for n in sorted(new - old)]
    if saved != here:
        raise _misfit(lines or ["the same parameters in other groups or another order"], where)


def _sizes(key: str, shape: Sequence[int], parameter: Tensor) -> str:
    return f"{key}: {tuple(shape)}, the parameter is {tuple(parameter.shape)}"


def _misfit(lines: Iterable[str], where: str | Path) -> CheckpointError:
    return CheckpointError(
        "the optimizer's state in the checkpoint does not fit this optimizer",
        where=str(where),
        got=listing(lines),
        rule="the same parameters, in the same groups, of the same shapes",
        remedy="resume with the model, the trainable parameters and the optimizer of the run "
        "that saved it, or start a new run from its weights",
    )
