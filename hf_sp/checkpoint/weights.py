"""Whole tensors to shards and back: the weights.

Owns how shards become whole tensors without every rank holding the model; the part that a rank
keeps is cut in ``hf_sp.comm.shard``. Weights are written as whole tensors under Hugging Face's
names, kept by the writing rank alone. What Trainer and accelerate make
of it is in ``hf_sp.integrations``.

Private API: ``distributed_c10d._get_default_store``, the only way to learn that a rank is absent
without a collective that would hang. Held by tests/integrations/test_names.py.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_sp.checkpoint.packed import packed_dims
from hf_sp.comm.shard import shard_like
from hf_sp.errors import CheckpointError
from hf_sp.state import parallel_state

logger = logging.getLogger(__name__)

_HOOKED = "_hf_sp_load_hook"
_WARN_SECONDS = 10.0
_LISTED = 8
"""Problems listed in full in one message."""


def whole(x: Tensor) -> Tensor:
    """The whole tensor of a DTensor (a collective), any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


# --- loading weights ----------------------------------------------------------------------------


def listing(problems: Iterable[str]) -> str:
    """The first few problems, one a line, and how many more there are."""
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
    if not prefix and isinstance(module, PreTrainedModel):
        _convert(module, state_dict)
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
            got=listing(wrong),
            rule="tensors have the shape of the whole parameter, as plain transformers saves it",
            remedy="load the checkpoint that was saved from this configuration of the model",
        )
    for key, parameter in incoming.items():
        state_dict[key] = shard_like(state_dict[key], parameter)


def _convert(model: PreTrainedModel, state_dict: dict[str, Any]) -> None:
    """Give a checkpoint of another form the model's names, in place, as ``from_pretrained`` does.

    transformers writes packed experts one by one, under the names of the first checkpoints. Trainer
    reads its own checkpoints back without converting them: it would go on with whatever experts the
    model had.
    """
    own = set(model.state_dict())
    lost, strange = own - set(state_dict), set(state_dict) - own
    if not any(name in lost for name in packed_dims(model)) or not strange:
        return
    config = copy.deepcopy(model.config)
    # What tells Trainer that the model is parallel would have transformers shard this copy.
    config.__dict__.pop("distributed_config", None)
    with torch.random.fork_rng(devices=[]):
        loaded: Any = type(model).from_pretrained(
            None,
            config=config,
            state_dict=dict(state_dict),
            dtype=model.dtype,
            output_loading_info=True,
        )
    plain, told = loaded
    made = plain.state_dict()
    for name in lost - set(told["missing_keys"]):
        state_dict[name] = made[name]
    for name in strange - set(told["unexpected_keys"]):
        del state_dict[name]


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
    group, ranks = state.all_ranks, state.everyone.size
    mine = [k for k, v in values.items() if isinstance(v, DTensor)]
    names = [mine]
    if ranks > 1:
        dist.broadcast_object_list(names, src=dist.get_global_rank(group, 0), group=group)
        absent: list[Any] = [None] * ranks
        dist.all_gather_object(absent, sorted(set(names[0]) - set(mine)), group=group)
        if any(absent):
            raise CheckpointError(
                "the ranks were asked to save different parameters",
                got=listing(f"rank {r} lacks {k}" for r, keys in enumerate(absent) for k in keys),
                rule="all ranks save the same names",
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
