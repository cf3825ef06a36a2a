"""Weights of a parallelized model: whole tensors in, this rank's shards kept; and shards on disk.

``load_state_dict`` takes whole tensors; the part that a rank keeps is cut in ``hf_sp.comm.shard``.
What Trainer and accelerate make of it is in ``hf_sp.integrations``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_sp.checkpoint.background import Writing
from hf_sp.checkpoint.packed import packed_dims
from hf_sp.checkpoint.ranks import Together, listing, ranks_of
from hf_sp.checkpoint.shards import Shards, save_shards
from hf_sp.comm.shard import shard_like
from hf_sp.errors import CheckpointError

WEIGHTS_DIRECTORY = "weights_shards"
"""Name of the weights' directory inside a checkpoint folder that has shards of them."""

_HOOKED = "_hf_sp_load_hook"


def _shard_incoming(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
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
        raise _misfit(f"{type(module).__name__}.load_state_dict", wrong)
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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their first name: a tied one is one."""
    found = {id(x): (n, x) for n, x in reversed(model.state_dict(keep_vars=True).items())}
    return dict(reversed(found.values()))


def write_weights(model: nn.Module, directory: Path, writing: Writing) -> None:
    """Copy the weights, to be written as shards. To be called on every rank."""
    packed, tensors = packed_dims(model), _tensors(model)
    halved = {name: packed[name] for name in tensors if name in packed}
    save_shards(tensors, halved, directory, ranks_of(model), {}, writing.jobs)


def read_weights(model: nn.Module, directory: Path) -> None:
    """Read what ``write_weights`` wrote, at any degree. To be called on every rank.

    Raises:
        CheckpointError: it lacks weights, or is of others.
    """
    shards, packed, tensors = Shards(directory), packed_dims(model), _tensors(model)
    wrong = [
        f"{n}: {shards.shapes.get(n)} in the checkpoint, {tuple(x.shape)} in the model"
        for n, x in tensors.items()
        if shards.shapes.get(n) != tuple(x.shape)
    ]
    with Together(ranks_of(model), "the weights cannot be read", directory), torch.no_grad():
        if wrong:
            raise _misfit(str(directory), wrong)
        for name, x in tensors.items():
            x.copy_(shards.read(name, x, packed.get(name)))


def _misfit(where: str, wrong: list[str]) -> CheckpointError:
    return CheckpointError(
        "a checkpoint does not fit the parallelized model",
        where=where,
        got=listing(wrong),
        rule="tensors have the shape of the whole parameter, as plain transformers saves it",
        remedy="load the checkpoint that was saved from this configuration of the model",
    )


def install_load_hook(model: nn.Module) -> None:
    """Let ``model.load_state_dict`` take whole tensors. Can be called again."""
    if not model.__dict__.get(_HOOKED, False):
        model.register_load_state_dict_pre_hook(_shard_incoming)
        model.__dict__[_HOOKED] = True
