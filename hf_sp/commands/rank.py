"""One rank of a training run that is not there: a model's config, degrees and a batch.

Needs no weights, no GPU and no launcher: the training code itself runs on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_sp.adapters.fake import with_adapters
from hf_sp.api import CpMode, parallelize
from hf_sp.errors import ConfigError
from hf_sp.estimate import (
    TrainingCount,
    count_training,
    fake_tensors,
    fake_world,
)
from hf_sp.model.fsdp import make_buffers

Library = Literal["hf_sp", "transformers tp", "one GPU"]
LIBRARIES: tuple[Library, ...] = ("hf_sp", "transformers tp", "one GPU")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """What is and what is no DTensor apart: torch steps over both together in a loop alone."""
    known: dict[type, list[nn.Parameter]] = {}
    for parameter in parameters:
        known.setdefault(type(parameter.data), []).append(parameter)
    return [{"params": group} for group in known.values()]


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None] = {
    # Trainer's. Those after it are torch's own: intermediates of all parameters at once.
    "adamw": lambda parameters: torch.optim.AdamW(_groups(parameters), fused=True),
    "adamw_foreach": lambda parameters: torch.optim.AdamW(_groups(parameters), foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(_groups(parameters), foreach=True),
    "none": None,
}
# SDPA under a name that transformers makes no mask for: flash kernels get none either.
_ATTENTION = "sdpa_without_mask"


@dataclass(frozen=True)
class Run:
    """A training run, as one of its ranks sees it.

    Args:
        tp: tensor parallel degree.
        dp_shard: data parallel groups that share weights, gradients and optimizer state.
        cp: context parallel ranks of a group.
        cp_mode: how these attend.
        ep: expert parallel degree, as in ``parallelize``.
        seq: tokens of a row.
        batch: rows of a group's forward.
        sp: sequence parallelism.
        recompute: as in ``parallelize``.
        checkpointing: transformers' gradient checkpointing, of each layer.
        offload: of checkpointed layers' inputs, as in ``parallelize``.
        mlp_tile: as in ``parallelize``.
        lora: rank of adapters on all linears; 0: full training.
        dtype: of weights, gradients and optimizer state.
        optimizer: a key of ``OPTIMIZERS``.
        library: who makes the model parallel.
    """

    tp: int = 1
    dp_shard: int = 1
    cp: int = 1
    cp_mode: CpMode = "ulysses"
    ep: int = 1
    seq: int = 8192
    batch: int = 1
    sp: bool = True
    recompute: Any = None
    checkpointing: bool = False
    offload: bool = False
    mlp_tile: int | None = None
    lora: int = 0
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    library: Library = "hf_sp"

    @property
    def ranks(self) -> int:
        """GPUs of the run."""
        return self.tp * self.cp * self.dp_shard


def count(config: PreTrainedConfig, run: Run) -> TrainingCount:
    """Count a step of rank 0.

    Raises:
        ConfigError, PlanError: as ``parallelize``; or transformers has no causal LM of the config.
    """
    config = deepcopy(config)
    config.use_cache = False
    with fake_world(run.ranks) as mesh:
        apply = _APPLY[run.library](mesh, run)
        with fake_tensors(DTYPES[run.dtype]):
            ids = torch.zeros(run.batch, run.seq, dtype=torch.long)
            return count_training(
                lambda: prepare(apply(_build(config)), run),
                lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss,
                OPTIMIZERS[run.optimizer],
            )


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config of a model of so many layers; what it lists of each goes with them."""
    config = deepcopy(config)
    whole = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == whole:
            setattr(config, name, (value + value[-1:] * layers)[:layers])
    config.num_hidden_layers = layers
    return config


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model of shapes alone."""
    with torch.device("meta"):
        return _build(deepcopy(config), dtype=dtype)  # it notes its dtype there


def _build(config: PreTrainedConfig, **how: Any) -> nn.Module:
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    try:
        return AutoModelForCausalLM.from_config(config, attn_implementation=_ATTENTION, **how)
    except ValueError as error:
        raise ConfigError(
            "transformers has no causal language model of that config",
            where="NAME",
            got=type(config).__name__,
            legal="the config of a model that AutoModelForCausalLM makes",
        ) from error


def prepare(model: nn.Module, run: Run) -> nn.Module:
    """The model as it trains, after a first step."""
    model.train()
    if run.checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    if run.lora:
        model = with_adapters(model, run.lora)
        if run.checkpointing:
            model.enable_input_require_grads()  # type: ignore[operator]
    make_buffers(model)
    return model


def _with_hf_sp(mesh: Any, run: Run) -> Callable[[nn.Module], nn.Module]:
    degrees: dict[str, Any] = {"tp": run.tp, "cp": run.cp, "dp_shard": run.dp_shard}
    degrees["cp_mode"] = run.cp_mode
    if run.cp * run.dp_shard == 1:
        degrees = {"mesh": mesh}
    switches = {"recompute": run.recompute, "offload": run.offload, "mlp_tile": run.mlp_tile}
    return lambda model: parallelize(model, **degrees, sp=run.sp, ep=run.ep, **switches)


def _with_transformers(mesh: Any, run: Run) -> Callable[[Any], nn.Module]:
    from hf_sp.integrations.transformers_tp import distribute

    return distribute(run.tp)


_APPLY: dict[str, Callable[[Any, Run], Callable[[nn.Module], nn.Module]]] = {
    "hf_sp": _with_hf_sp,
    "transformers tp": _with_transformers,
    "one GPU": lambda mesh, run: lambda model: model,
}
