"""Whole tensors to shards and back: weights and optimizer state.

Owns the layout questions of saving and loading: which slice of a whole tensor a rank keeps, how
shards become whole tensors without every rank holding the model, and how optimizer state is written
so that it can be read at another degree. Knows torch only: what transformers, accelerate and PEFT
make of it is in ``hf_sp.integrations``.

Two things are written:

- weights, as whole tensors under Hugging Face's names, kept by the writing rank alone;
- optimizer state, as a torch.distributed.checkpoint (DCP) directory with the keys
  ``state.<parameter name>.<state name>`` and one JSON document, ``document``.

Private API: ``distributed_c10d._get_default_store``, the only way to learn that a rank is absent
without a collective that would hang. Held by tests/integrations/test_names.py.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_sp.errors import CheckpointError
from hf_sp.state import parallel_state

logger = logging.getLogger(__name__)

OPTIMIZER_DIRECTORY = "optimizer_dcp"
"""Name of the optimizer's directory inside a checkpoint folder."""

_VERSION = 1
_HOOKED = "_hf_sp_load_hook"
_WARN_SECONDS = 10.0
_LISTED = 8
"""Problems listed in full in one message."""


# --- one tensor ---------------------------------------------------------------------------------


def chunk(full: Tensor, dim: int, parts: int, index: int) -> Tensor:
    """Part ``index`` of ``full`` cut as ``torch.chunk`` and DTensor cut it; may be empty."""
    size = -(-full.shape[dim] // parts)
    start = min(index * size, full.shape[dim])
    return full.narrow(dim, start, min(size, full.shape[dim] - start))


def shard_like(full: Tensor, like: DTensor) -> DTensor:
    """This rank's part of a whole tensor, laid out as ``like``. No communication.

    The slice is cut where ``full`` is (on the CPU, as a rule), so that a GPU never holds the whole.

    Args:
        full: the whole tensor, the same on every rank.
        like: the DTensor whose mesh, placements and device count; its dtype does not.
    """
    if isinstance(full, DTensor):
        return full
    mesh = like.device_mesh
    if mesh.ndim == 1 and type(like.placements[0]) in (Shard, Replicate):
        placement = like.placements[0]
        part = full
        if isinstance(placement, Shard):
            part = chunk(full, placement.dim, mesh.size(), mesh.get_local_rank())
        part = part.to(like.to_local().device).contiguous()
        return DTensor.from_local(
            part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
    return distribute_tensor(full, mesh, like.placements, src_data_rank=None)


def whole(x: Tensor) -> Tensor:
    """The whole tensor of a DTensor (a collective), any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# --- loading weights ----------------------------------------------------------------------------


def _listing(problems: Iterable[str]) -> str:
    lines = list(problems)
    more = len(lines) - _LISTED
    return "\n".join(lines[:_LISTED] + ([f"and {more} more"] if more > 0 else []))


def _shard_incoming(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: object,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """``load_state_dict`` pre-hook: whole tensors in, this rank's shards out.

    Runs before any child of ``module`` loads, so that nothing is loaded when a shape is wrong.
    """
    incoming = {
        prefix + name: parameter
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if isinstance(parameter, DTensor) and isinstance(state_dict.get(prefix + name), Tensor)
    }
    wrong = [
        f"{key}: {tuple(state_dict[key].shape)}, the model has {tuple(parameter.shape)}"
        for key, parameter in incoming.items()
        if state_dict[key].shape != parameter.shape
    ]
    if wrong:
        raise CheckpointError(
            "a checkpoint does not fit the parallelized model",
            where=f"{type(module).__name__}.load_state_dict",
            got=_listing(wrong),
            rule="tensors have the shape of the whole parameter, as plain transformers saves it",
            remedy="load the checkpoint that was saved from this configuration of the model",
        )
    for key, parameter in incoming.items():
        state_dict[key] = shard_like(state_dict[key], parameter)


def install_load_hook(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` take whole tensors. Can be called again."""
    if not model.__dict__.get(_HOOKED, False):
        model.register_load_state_dict_pre_hook(_shard_incoming)
        model.__dict__[_HOOKED] = True


# --- who is here --------------------------------------------------------------------------------


def _timeout_seconds() -> float:
    return float(os.environ.get("HF_SP_SAVE_TIMEOUT", "180"))


_meetings: dict[str, int] = {}


def meet(group: dist.ProcessGroup | None, what: str) -> None:
    """Return when every rank of the group has called this; raise on its first rank if some do not.

    The usual mistake is ``if rank == 0: model.save_pretrained(...)``, which would hang in the first
    gather. A rank's presence is written to the rendezvous store, which needs no partner.

    Args:
        group: the ranks that must come, None for all.
        what: the call, as the user wrote it.

    Raises:
        CheckpointError: on the group's first rank, which is the one that is called alone by
            mistake; after ``HF_SP_SAVE_TIMEOUT`` seconds (180). The others wait as long as the
            process group would: the first rank may well have something to do before it comes.
    """
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1 or dist.get_backend(group) == "fake":
        return
    store = dist.distributed_c10d._get_default_store()
    rank = dist.get_rank()
    name = f"hf_sp/{what}/{ranks[0]}-{ranks[-1]}"
    count = _meetings[name] = _meetings.get(name, 0) + 1
    store.set(f"{name}/{count}/{rank}", "here")
    patience = _timeout_seconds() if rank == ranks[0] else timedelta(minutes=30).total_seconds()
    started, pause, warned = time.monotonic(), 0.001, False
    absent = [r for r in ranks if r != rank]
    while True:
        absent = [r for r in absent if not store.check([f"{name}/{count}/{r}"])]
        if not absent:
            return
        waited = time.monotonic() - started
        if waited > patience:
            raise CheckpointError(
                f"{what} was called on some ranks only",
                where=f"rank {rank}",
                got=f"no call from ranks {absent} within {waited:.0f} s",
                rule="the weights are sharded: every rank has a part of what is written",
                remedy=f"call {what} on every rank, outside of any 'if rank == 0' or "
                "'if is_main_process'; only one rank writes the files. "
                "HF_SP_SAVE_TIMEOUT sets the seconds to wait.",
            )
        if waited > _WARN_SECONDS and not warned:
            warned = True
            logger.warning(
                "%s on rank %d has waited %.0f s for ranks %s: it has to be called on every rank",
                what,
                rank,
                waited,
                absent,
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


# --- saving weights -----------------------------------------------------------------------------


def gather_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any] | None = None, *, keep: bool = True
) -> dict[str, Any]:
    """Whole tensors of a parallelized model, on the CPU of the ranks that keep them.

    To be called on every rank. One tensor is whole at a time; a rank that does not keep them
    returns an empty dict. Names that share one parameter share one tensor in the result.

    Args:
        model: the parallelized model.
        state_dict: what to gather, ``model.state_dict()`` if None. The first rank's names count.
        keep: whether this rank wants the result.
    """
    state = parallel_state(model)
    values = dict(model.state_dict() if state_dict is None else state_dict)
    if state is None:
        return values if keep else {}
    group = state.group
    mine = [k for k, v in values.items() if isinstance(v, DTensor)]
    names = [mine]
    if state.tp > 1:
        dist.broadcast_object_list(names, src=dist.get_global_rank(group, 0), group=group)
        absent: list[Any] = [None] * state.tp
        dist.all_gather_object(absent, sorted(set(names[0]) - set(mine)), group=group)
        if any(absent):
            raise CheckpointError(
                "the ranks were asked to save different parameters",
                got=_listing(f"rank {r} lacks {k}" for r, keys in enumerate(absent) for k in keys),
                rule="every rank of a tensor-parallel group saves the same names",
            )
    identity = {k: id(p) for k, p in model.named_parameters(remove_duplicate=False)}
    done: dict[int, Tensor | None] = {}
    gathered: dict[str, Any] = {}
    for name in names[0]:
        key = identity.get(name)
        if key is None or key not in done:
            full = whole(values[name].detach())
            kept = full.cpu() if keep else None
            del full
            if key is not None:
                done[key] = kept
        else:
            kept = done[key]
        if keep:
            gathered[name] = kept
    if not keep:
        return {}
    result: dict[str, Any] = {}
    for name, value in values.items():
        if name in gathered:
            result[name] = gathered[name]
        elif not isinstance(value, DTensor):
            result[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    return result


# --- optimizer state ----------------------------------------------------------------------------


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
    if state is not None and state.tp > 1:
        # A shard can have the whole's shape on one rank only; all ranks have to agree to refuse.
        told: list[Any] = [None] * state.tp
        dist.all_gather_object(told, problems, group=state.group)
        problems = sorted({p for rank in told for p in rank})
    if problems:
        raise CheckpointError(
            "the optimizer's state cannot be saved",
            where=type(optimizer).__name__,
            got=_listing(problems),
            rule="the state of a sharded parameter is a DTensor, a single number or plain data",
            remedy="save the weights alone (Trainer: save_only_model=True), or take an optimizer "
            "of torch.optim",
        )
    tensors["document"] = json.dumps(document)
    Path(directory).mkdir(parents=True, exist_ok=True)
    dcp_save(tensors, checkpoint_id=str(directory), no_dist=not dist.is_initialized())


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

    templates: dict[str, Any] = {}
    wrong: list[str] = []
    for name in parameters:
        head = f"state.{name}."
        for key, item in metadata.items():
            if not key.startswith(head) or "." in key[len(head) :]:
                continue
            assert isinstance(item, TensorStorageMetadata)
            parameter = parameters[name]
            dtype = item.properties.dtype
            if item.size == parameter.shape and isinstance(parameter, DTensor):
                local = torch.zeros_like(parameter.to_local(), dtype=dtype)
                templates[key] = DTensor.from_local(
                    local,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            elif item.size == parameter.shape or item.size.numel() == 1:
                templates[key] = torch.zeros(item.size, dtype=dtype)
            else:
                wrong.append(
                    f"{key}: {tuple(item.size)}, the parameter is {tuple(parameter.shape)}"
                )
    if wrong:
        raise _misfit(wrong, directory)
    dcp_load(templates, checkpoint_id=str(directory), no_dist=no_dist)

    order = [n for g in groups for n in g]
    state: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(order):
        head = f"state.{name}."
        entry = {k[len(head) :]: v for k, v in templates.items() if k.startswith(head)}
        entry.update({k: _decode(v) for k, v in document["scalars"].get(name, {}).items()})
        if entry:
            state[index] = entry
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
        got=_listing(lines),
        rule="the same parameters, in the same groups, of the same shapes",
        remedy="resume with the model, the trainable parameters and the optimizer of the run "
        "that saved it, or start a new run from its weights",
    )
