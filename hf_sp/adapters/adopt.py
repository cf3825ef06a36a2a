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

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_sp.adapters.lora_linear import ParallelLora
from hf_sp.adapters.lora_vocab import CLASSES
from hf_sp.errors import ConfigError
from hf_sp.model.fsdp import shard_blocks_over_data
from hf_sp.model.shard import agree_on_weights, device_of, shard_parameter
from hf_sp.state import ParallelState, parallel_state

logger = logging.getLogger(__name__)

_COPY = "_hf_sp_adopted"
# A, B and magnitude, in the order of ``ParallelLora.placements``: of a linear, of an embedding.
_TABLES = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B")


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a ``PeftModel``; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The plain model inside, with its adapters set aside; they are put back on the way out.

    If the model has been parallelized meanwhile, its adapters are sharded then.
    """
    base = base_model(model)
    parked: list[tuple[nn.Module, str, Any]] = []
    for parent in list(base.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, BaseTunerLayer | AuxiliaryTrainingWrapper):
                parked.append((parent, name, child))
    for parent, name, wrapper in parked:
        tuner = isinstance(wrapper, BaseTunerLayer)
        parent._modules[name] = wrapper.get_base_layer() if tuner else wrapper.original_module
    try:
        yield base
    finally:
        for parent, name, wrapper in parked:
            parent._modules[name] = wrapper
        if parallel_state(base) is not None:
            adopt(base)


def adopt(model: nn.Module) -> None:
    """Shard what is still whole of a parallelized model's adapters. Can be called again.

    Collectives: as ``parallelize`` compares weights: 1 small all-gather, and a broadcast of each
    factor that differs between the ranks (seeds that differ draw other factors).
    """
    state = parallel_state(model)
    assert state is not None
    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    whole = [(m, *own) for m in layers for own in _own(m) if not isinstance(own[2], DTensor)]
    copies = [
        (wrapper, name, copied)
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for name, copied in wrapper.modules_to_save.items()
        if _COPY not in copied.__dict__
    ]
    plain = [p for *_, c in copies for p in c.parameters() if not isinstance(p, DTensor)]
    compared = nn.ParameterList([*(own[3] for own in whole), *plain])
    taken = agree_on_weights(compared, state.everyone, state.mesh.device_type)
    if taken and state.everyone.rank == 0:
        message = "%d of %d adapter tensors differed; all ranks now have those of rank 0"
        logger.warning(message, len(taken), len(compared))
    for layer in layers:
        kind = CLASSES.get((type(layer), type(layer.get_base_layer())))
        if kind is not None:
            layer.__class__, layer.axis = kind, state.axis
        if not isinstance(layer, ParallelLora):
            raise ConfigError(
                "an adapter over this module is not supported for a parallelized model",
                where=type(layer.get_base_layer()).__name__,
                rule="LoRA over linears of the layers, the embedding, the head and a classifier",
                remedy="name the linears in target_modules",
            )
    for layer, owner, key, p, which in whole:
        base = layer.get_base_layer().weight
        device = base.device if base.is_meta else device_of(state)
        owner[key] = shard_parameter(p, layer.placements[which], state, device)
    if isinstance(model, FSDPModule):
        shard_blocks_over_data(model, state)
    for wrapper, name, copied in copies:
        wrapper.modules_to_save[name] = _shard_copy(wrapper.original_module, copied, state)


def _own(layer: Any) -> Iterator[tuple[dict[str, Any], str, nn.Parameter, int]]:
    """A LoRA layer's own parameters: where each is, and whether A, B or magnitude; in order."""
    for place, table in enumerate(_TABLES):
        for module in getattr(layer, table).modules():
            for name, p in module._parameters.items():
                if p is not None:
                    yield module._parameters, name, p, place % 3


def _shard_copy(original: nn.Module, old: nn.Module, state: ParallelState) -> nn.Module:
    """A trainable copy of a module: made parallel as the original is, with its own values."""
    # PEFT copies the module alone, and the model's state with it; ours shares the state.
    new = copy.deepcopy(original, {id(state): state})
    values = dict(old.named_parameters())
    like: Any
    for key, like in new.named_parameters():
        value = values[key]
        if not isinstance(value, DTensor):
            value = shard_parameter(value, like.placements[0], state, like.device)
        new._parameters[key] = nn.Parameter(value.detach().clone(), values[key].requires_grad)
    new.train(old.training)
    new.__dict__[_COPY] = True
    return new
