"""Which adapters a parallelized model can have; all others are refused before it is touched."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from peft import PeftModel, PeftType
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.conversion_mapping import get_model_conversion_mapping

from hf_sp.adapters.adopt import base_model
from hf_sp.checks_fsdp import check_packed
from hf_sp.errors import ConfigError
from hf_sp.model.embedding import VocabParallelEmbedding
from hf_sp.model.head import VocabParallelHead
from hf_sp.state import parallel_state

# Values of init_lora_weights that do not look at the base weights.
_INITS = (True, False, "gaussian", "orthogonal")
_PARTIAL = "a factor whose gradient is partial would silently be trained on a part of it"
_PACKED = (
    "PEFT replaces the experts' packed weights for each forward, which the block's entry would "
    "not see"
)
# Fields of a config that have to be left out, and why.
_UNSUPPORTED = {
    "lora_bias": "the bias of a row linear's factor would be added once on every rank",
    "target_parameters": _PACKED,
    "trainable_token_indices": "it replaces rows of an embedding whose rows live on other ranks",
    "layer_replication": "a layer that stands in several places cannot be sharded once",
    "ensure_weight_tying": "copies of tied modules are sharded one by one",
    "megatron_config": "PEFT would build Megatron's own parallel layers",
}


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters that are there before ``parallelize`` and cannot be sharded.

    Raises:
        ConfigError: the first of them that is met.
    """
    for name, config in (getattr(model, "peft_config", None) or {}).items():
        check_config(config, f"adapter {name!r}", after=False)
    if "peft" in type(model).__module__.split(".") and not isinstance(model, PeftModel):
        raise ConfigError(
            f"{type(model).__name__} cannot be parallelized",
            rule="PeftModel and its subclasses are understood",
            remedy="get_peft_model(model, LoraConfig(...))",
        )
    base: Any = base_model(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            _check_layer(path, module, head)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            if not isinstance(module, ModulesToSaveWrapper):
                raise _refuse(type(module).__name__, path, legal="modules_to_save")
            _check_saved(path, module.original_module)


def _check_layer(path: str, layer: Any, head: Any) -> None:
    if type(layer) not in (LoraLinear, LoraEmbedding):
        raise _refuse(type(layer).__name__, path, legal="LoRA over nn.Linear and nn.Embedding")
    if isinstance(layer.base_layer, BaseTunerLayer):
        raise _refuse("adapters in adapters", path, legal="one tuner layer over each module")
    if layer.merged:
        raise ConfigError(
            "an adapter is merged",
            where=path,
            got=", ".join(layer.merged_adapters),
            rule="a merged weight is sharded as it is, and could not be unmerged exactly",
            remedy="unmerge_adapter() first, or merge_and_unload()",
        )
    if layer.lora_magnitude_vector and (layer is head or type(layer) is not LoraLinear):
        raise _refuse("DoRA on the embedding or the head", path, legal="DoRA on other linears")


def check_new_adapter(model: nn.Module, config: Any, name: str, low_cpu_mem_usage: bool) -> None:
    """Refuse an adapter that is about to be added to a parallelized model.

    Raises:
        ConfigError: nothing has been changed then.
    """
    where = f"adapter {name!r}"
    check_config(config, where, after=True)
    _check_groups(model, config, where)
    if low_cpu_mem_usage:
        raise _refuse(
            "low_cpu_mem_usage=True",
            where,
            rule="factors are compared over the ranks and sharded when they are made",
            legal="low_cpu_mem_usage=False",
        )
    _check_experts(model, config, where)
    saved = getattr(config, "modules_to_save", None) or ()
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            continue
        if any(path == key or path.endswith(f".{key}") for key in saved):
            _check_saved(path, module)
        vocabulary = isinstance(module, VocabParallelHead | VocabParallelEmbedding)
        named = vocabulary and config.target_modules != "all-linear"
        if config.use_dora and named and check_target_module_exists(config, path):
            raise _refuse("DoRA on the embedding or the head", path, legal="DoRA on other linears")


def _check_groups(model: nn.Module, config: Any, where: str) -> None:
    """Refuse what FSDP, once it is there, is not told of: it takes one adapter, of the blocks."""
    state = parallel_state(model)
    if state is None or not state.fsdp:
        return
    for leaf in (leaf for b in state.plan.blocks for leaf in b.leaves if leaf.style == "packed"):
        if config.target_modules == "all-linear" or check_target_module_exists(config, leaf.path):
            key = get_pattern_key(config.rank_pattern, leaf.path)
            rank = config.rank_pattern.get(key, config.r)
            check_packed(f"{where}, {leaf.path}", rank, state.degrees)
    inside = tuple(f"{block.path}." for block in state.plan.blocks)
    chosen = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and not path.startswith(inside)
        if config.target_modules != "all-linear" and check_target_module_exists(config, path)
    ]
    has = any(isinstance(model.get_submodule(b.path), FSDPModule) for b in state.plan.blocks)
    if what := (
        "a second adapter" * has
        or "an adapter outside of the attention and MLP blocks" * bool(chosen)
        or "modules_to_save" * bool(getattr(config, "modules_to_save", None))
    ):
        raise ConfigError(
            f"{what} cannot be added to a model with data or context parallel ranks",
            where=where,
            got=", ".join(chosen) or str(state.degrees),
            rule="FSDP has sharded the model; it is given one more group for each block",
            remedy="get_peft_model (and add_adapter) first, parallelize second",
        )


def _check_experts(model: Any, config: Any, where: str) -> None:
    """Refuse what PEFT makes of the names of old checkpoints' experts, "all-linear" among them."""
    wanted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(
            wanted, model=model, conversions=get_model_conversion_mapping(model)
        )
    except ValueError:
        return  # PEFT says it better
    if wanted.target_parameters:
        raise _refuse(
            "LoRA on experts",
            where,
            got=f"target_modules={config.target_modules!r}, which PEFT takes for "
            + ", ".join(sorted(wanted.target_parameters)),
            rule=_PACKED,
            legal="linears, by name: q_proj, k_proj, v_proj, o_proj",
        )


def _check_saved(path: str, module: nn.Module) -> None:
    matrices = any(p.dim() > 1 for p in module.parameters(recurse=False))
    if next(module.children(), None) is not None:
        what = "a module with children"
        rule = "a copy of a block or of a layer would run without its collectives"
        remedy = "name the modules inside it that should train"
    elif matrices and not isinstance(module, nn.Linear | nn.Embedding):
        what = "a router or experts"
        rule = "their weights belong to the block's entry; a copy's would not be used"
        remedy = "train them by requires_grad_(True) on the model itself"
    else:
        return
    raise ConfigError(
        f"modules_to_save holds {what}",
        where=path,
        got=type(module).__name__,
        rule=rule,
        legal="single linears, norms, the embedding, the head, a classifier",
        remedy=remedy,
    )


def check_config(config: Any, where: str, *, after: bool) -> None:
    """Refuse what a config asks for and hf_sp does not do.

    Args:
        config: a PEFT config.
        where: which adapter, for the message.
        after: whether the model is parallelized already.

    Raises:
        ConfigError: the first of them that is met.
    """
    if config.peft_type != PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise _refuse(f"{kind}", where, legal="LORA")
    init = config.init_lora_weights
    if after and init not in _INITS:
        raise ConfigError(
            f"init_lora_weights={init!r} needs the whole base weights",
            where=where,
            rule="each rank holds a shard, whose singular vectors are not the weight's",
            legal=", ".join(map(repr, _INITS)),
            remedy="get_peft_model first, parallelize second: adapters of any init are sharded",
        )
    others = [
        field.name
        for field in dataclasses.fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
        if field.name != "use_dora"
    ]
    others += [init] if init == "mica" else []
    if others:
        raise _refuse(", ".join(others), where, legal="plain LoRA, rsLoRA, DoRA")
    if config.use_dora and config.lora_dropout:
        raise _refuse(
            "DoRA with lora_dropout",
            where,
            got=f"lora_dropout={config.lora_dropout}",
            rule="it runs the base layer a second time, on the dropped input",
            legal="lora_dropout=0",
        )
    for field, rule in _UNSUPPORTED.items():
        value = getattr(config, field, None)
        if value:
            got, remedy = f"{field}={value!r}", f"leave {field} out"
            raise _refuse(field, where, got=got, rule=rule, remedy=remedy)


def _refuse(what: str, where: str, *, rule: str = _PARTIAL, **parts: str) -> ConfigError:
    what = f"{what} is not supported for a parallelized model"
    return ConfigError(what, where=where, rule=rule, **parts)
