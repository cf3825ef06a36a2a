"""PEFT and a parallelized model: adapters before ``parallelize`` and after it.

One mechanism for both orders. PEFT makes *whole* factors (the same ones as in one process, drawn
from the same random state), they are compared over the ranks, sharded, and the layer's class is
changed: ``adopt``. Adapters that are there first are set aside while the base is sharded
(``without_adapters``); those that come later are adopted at the end of ``inject_adapter``
(``peft_patches``).
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from hf_sp.adapters.lora_vocab import class_for, placements_of
from hf_sp.errors import ConfigError
from hf_sp.model.shard import agree_on_weights, shard_parameter
from hf_sp.state import ParallelState, parallel_state

logger = logging.getLogger(__name__)

_COPY = "_hf_sp_adopted"


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a ``PeftModel``; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


# --- adapters that are there before parallelize -------------------------------------------------


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The plain model inside, with its adapters set aside; they are put back on the way out.

    If the model has been parallelized meanwhile, its adapters are sharded then.
    """
    base = base_model(model)
    parked: list[tuple[nn.Module, str, Any]] = []
    _park(base, parked)
    try:
        yield base
    finally:
        for parent, name, wrapper in parked:
            parent._modules[name] = wrapper
        if parallel_state(base) is not None:
            adopt(base)


def _park(module: Any, parked: list[tuple[nn.Module, str, Any]]) -> None:
    for name, child in list(module._modules.items()):
        if isinstance(child, BaseTunerLayer):
            parked.append((module, name, child))
            module._modules[name] = child.get_base_layer()
        elif isinstance(child, AuxiliaryTrainingWrapper):
            parked.append((module, name, child))
            module._modules[name] = child.original_module
        elif child is not None:
            _park(child, parked)


# --- sharding adapters --------------------------------------------------------------------------


def adopt(model: nn.Module) -> None:
    """Shard what is still whole of a parallelized model's adapters. Can be called again.

    Collectives: as ``parallelize`` compares weights: 1 small all-gather, and a broadcast of each
    factor that differs between the ranks (seeds that differ draw other factors).
    """
    state = parallel_state(model)
    assert state is not None
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    whole = [(o, n, p) for m in layers for o, n, p in _own(m) if not isinstance(p, DTensor)]
    copies = [c for w in wrappers for c in w.modules_to_save.values() if _COPY not in c.__dict__]
    plain = [p for c in copies for p in c.parameters() if not isinstance(p, DTensor)]
    taken = agree_on_weights(
        nn.ParameterList([p for _, _, p in whole] + plain), state.axis, state.mesh.device_type
    )
    if taken and state.rank == 0:
        logger.warning(
            "%d of %d adapter tensors differed between the ranks; all ranks now have those of tp "
            "rank 0",
            len(taken),
            len(whole) + len(plain),
        )
    for layer in layers:
        kind = class_for(layer)
        if kind is not None:
            kind.take_over(layer)
        if not hasattr(layer, "placements"):
            raise ConfigError(
                "an adapter over this module is not supported for a parallelized model",
                where=type(layer.get_base_layer()).__name__,
                rule="LoRA over linears of the layers, the embedding, the head and a classifier",
                remedy="name the linears in target_modules",
            )
        _shard_layer(layer, state)
    for wrapper in wrappers:
        for name in list(wrapper.modules_to_save):
            _shard_copy(wrapper, name, state)


def _own(layer: Any) -> Iterator[tuple[Any, str, nn.Parameter]]:
    """``(owner, name, parameter)`` of a LoRA layer's own parameters, in a fixed order."""
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
        for module in getattr(layer, kind).values():
            for name, p in module._parameters.items():
                if p is not None:
                    yield module, name, p
    for kind in ("lora_embedding_A", "lora_embedding_B"):
        table = getattr(layer, kind)
        for name in table:
            yield table, name, table[name]


def _shard_layer(layer: Any, state: ParallelState) -> None:
    A, B, magnitude = placements_of(layer)
    device = local_device(layer)
    place = {id(m): A for m in layer.lora_A.values()}
    place |= {id(m): B for m in layer.lora_B.values()}
    place |= {id(m): magnitude for m in layer.lora_magnitude_vector.values()}
    place |= {id(layer.lora_embedding_A): A, id(layer.lora_embedding_B): B}
    for owner, name, p in list(_own(layer)):
        if isinstance(p, DTensor):
            continue
        new = shard_parameter(p, place[id(owner)], state, device)
        if isinstance(owner, nn.ParameterDict):
            owner[name] = new
        else:
            owner._parameters[name] = new


def local_device(layer: Any) -> torch.device:
    """Where a layer's base weight lives."""
    return layer.get_base_layer().weight.device


def _shard_copy(wrapper: Any, name: str, state: ParallelState) -> None:
    """A trainable copy of a module: made parallel as the original is, with its own values."""
    old = wrapper.modules_to_save[name]
    if _COPY in old.__dict__:
        return
    # PEFT copies the module alone, and the model's state with it; ours shares the state.
    new = copy.deepcopy(wrapper.original_module, {id(state): state})
    values = dict(old.named_parameters())
    for key, like in list(new._parameters.items()):
        if like is None:
            continue
        value = values[key]
        if not isinstance(value, DTensor):
            value = shard_parameter(value, like.placements[0], state, like.device)
        new._parameters[key] = nn.Parameter(value.detach().clone(), values[key].requires_grad)
    new.train(old.training)
    new.__dict__[_COPY] = True
    wrapper.modules_to_save[name] = new
