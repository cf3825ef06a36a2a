"""PEFT's own methods on a parallelized model: new adapters, what is refused, files.

Versions named here: peft 0.21.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import hotswap, save_and_load
from torch import nn
from torch.distributed.tensor import DTensor

from hf_sp.adapters.adopt import adopt
from hf_sp.adapters.checks import check_config, check_new_adapter
from hf_sp.checkpoint.gather import gather_state_dict
from hf_sp.checkpoint.ranks import Together, meet, ranks_of
from hf_sp.checkpoint.weights import install_load_hook
from hf_sp.errors import ConfigError
from hf_sp.model.head import VocabParallelHead
from hf_sp.model.linear import ParallelLinear
from hf_sp.patching import Patch, Patches
from hf_sp.state import parallel_state

PATCHES = Patches(lambda model: parallel_state(model) is not None)
"""Patches that act on tuners and PeftModels over a parallelized model, and on such models."""

LAYER_PATCHES = Patches(lambda _: True)
"""Patches that look at the layer."""


@LAYER_PATCHES.on(LoraLayer, "_get_in_out_features")
def whole_sizes(original: Patch, self: Any, module: nn.Module) -> tuple[int, int]:
    """PEFT sizes factors by a linear's shard; whole ones are drawn as in one process."""
    weight = getattr(module, "weight", None)
    if isinstance(module, ParallelLinear | VocabParallelHead) and isinstance(weight, DTensor):
        return weight.shape[1], weight.shape[0]
    return original(self, module)


@LAYER_PATCHES.on(DoraLinearLayer, "update_layer")
def whole_magnitude(original: Patch, self: Any, *, base_layer: Any, **kwargs: Any) -> None:
    """DoRA's magnitude starts as the norms of the whole weight's rows; PEFT mixes whole and shard.

    One weight is whole at a time.
    """
    if isinstance(base_layer, ParallelLinear) and isinstance(base_layer.weight, DTensor):
        whole = nn.Linear(1, 1, bias=False, device="meta")
        full = base_layer.weight.full_tensor().detach()
        whole.weight = nn.Parameter(full, requires_grad=False)
        base_layer = whole
    original(self, base_layer=base_layer, **kwargs)


@PATCHES.on(BaseTuner, "inject_adapter")
def shard_new_adapters(
    original: Patch, self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """Refuse what would be wrong before the model is touched; shard what PEFT has made."""
    low = kwargs.get("low_cpu_mem_usage", args[1] if len(args) > 1 else False)
    # ``get_peft_model(low_cpu_mem_usage=True)`` says so by a context of accelerate's alone.
    low = bool(low) or nn.LayerNorm(1, device="cpu").weight.is_meta
    check_new_adapter(model, self.peft_config[adapter_name], adapter_name, low)
    original(self, model, adapter_name, *args, **kwargs)
    adopt(model)
    install_load_hook(model)


@PATCHES.on(PeftModel, "add_adapter")
def check_prompt_learning(
    original: Patch, self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any
) -> Any:
    """Prompt learning comes this way and not through ``inject_adapter``."""
    check_config(peft_config, f"adapter {adapter_name!r}", after=True)
    return original(self, adapter_name, peft_config, *args, **kwargs)


@PATCHES.on(LoraModel, "add_weighted_adapter")
def refuse_weighted_adapters(original: Patch, self: Any, *args: Any, **kwargs: Any) -> None:
    """PEFT writes whole tensors, or those of a decomposition, into the factors' data."""
    raise ConfigError(
        "add_weighted_adapter is not supported for a parallelized model",
        where="LoraModel.add_weighted_adapter",
        rule="the factors are sharded; new ones are made by injecting an adapter",
        remedy="combine them in one process, save, and load the result here; or set_adapter "
        "with several names",
    )


@PATCHES.on(hotswap, "hotswap_adapter_from_state_dict")
def refuse_hotswap(original: Patch, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """PEFT copies whole tensors over the shards, one factor after the other."""
    raise ConfigError(
        "hotswap_adapter is not supported for a parallelized model",
        where=type(model).__name__,
        rule="the factors are shards of what the file holds",
        remedy="load_adapter under another name, then set_adapter",
    )


@PATCHES.on(save_and_load, "_reshard_dtensor_values_for_load")
def whole_tensors_only(original: Patch, model: nn.Module, state_dict: dict[str, Any]) -> Any:
    """PEFT takes a tensor of a shard's shape for this rank's shard.

    ``load_state_dict`` of a parallelized model cuts whole tensors itself and refuses others.
    """
    return state_dict


@PATCHES.on(PeftModel, "save_pretrained")
def save_adapters_alone(
    original: Patch, self: Any, save_directory: Any, *args: Any, **kwargs: Any
) -> None:
    """PEFT gathers the whole model on every rank, keeps a few tensors, and all ranks write.

    Gathered here: what PEFT would write, one tensor at a time, for the rank that writes.
    """
    ranks = ranks_of(self)
    meet(ranks.group, "PeftModel.save_pretrained")
    given = ("safe_serialization", "selected_adapters", "save_embedding_layers", "is_main_process")
    kwargs |= dict(zip(given, args, strict=False))
    if kwargs.get("path_initial_model_for_weight_conversion") is not None:
        raise ConfigError(
            "path_initial_model_for_weight_conversion is not for a parallelized model",
            where="PeftModel.save_pretrained",
            rule="PEFT loads the initial adapter into the model, on the writing rank alone",
            remedy="save without it, and convert in one process",
        )
    writes = bool(kwargs.get("is_main_process", True)) and ranks.first
    everything = kwargs.pop("state_dict", None)
    everything = self.state_dict() if everything is None else everything
    wanted: set[str] = set()
    with warnings.catch_warnings():
        # PEFT says the same when it writes.
        warnings.simplefilter("ignore")
        for adapter in kwargs.get("selected_adapters") or self.peft_config:
            picked = save_and_load.get_peft_model_state_dict(
                self,
                # Each tensor's name stands in for it.
                {name: name for name in everything},
                adapter,
                save_embedding_layers=kwargs.get("save_embedding_layers", "auto"),
            )
            wanted |= set(picked.values())
    chosen = {name: value for name, value in everything.items() if name in wanted}
    whole = gather_state_dict(self, chosen, keep=writes)
    with Together(ranks, "the adapters could not be saved", save_directory):
        if writes:
            original(self, save_directory, state_dict=whole, **kwargs)
