"""``from_pretrained``: a model that no rank ever holds whole.

transformers builds a model on the meta device and then fills it. Between the two ``parallelize`` is
called (``integrations/loading.py``), so that each rank reads slices of the files.

What a checkpoint lacks is made whole, as transformers initialises it, and is cut afterwards.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor, Replicate
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from hf_sp.api import CpMode, parallelize
from hf_sp.checkpoint.ranks import listing
from hf_sp.comm.shard import shard_like
from hf_sp.errors import CheckpointError, ConfigError
from hf_sp.integrations.loading import QUANTISED, Loading, patches
from hf_sp.model.shard import agree_on_weights, device_of, differing, home_of, report_taken
from hf_sp.state import Checkpoint, ParallelState, Recompute, parallel_state

_PLACED = "each rank reads its own shards, straight to its device"
_NATIVE = "hf_sp shards the model; transformers must not do it too"
# Arguments of transformers' from_pretrained that say otherwise -> the rule that they break.
_REFUSED = {
    **dict.fromkeys(
        ("quantization_config", "load_in_8bit", "load_in_4bit", "gguf_file"), QUANTISED
    ),
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "offload_buffers"), _PLACED),
    **dict.fromkeys(("distributed_config", "device_mesh", "tp_plan", "tp_size"), _NATIVE),
    **dict.fromkeys(
        ("use_kernels", "kernel_config"),
        "transformers' kernels would replace forwards that hf_sp has replaced",
    ),
}


def load_config(name_or_path: str | os.PathLike[str]) -> PreTrainedConfig:
    """The config of a local folder or file, or of a name in the local hub cache.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "no config is known by that name on this machine",
            where="NAME",
            got=f"{str(name_or_path)!r} ({str(error).splitlines()[0]})",
            legal="a folder with a config.json, such a file, or a name in the local hub cache",
            remedy="download the config alone: hf download NAME config.json",
        ) from error


def from_pretrained(  # noqa: D417 (they are documented by parallelize)
    name_or_path: str | os.PathLike[str] | None,
    *,
    model_class: Any = AutoModelForCausalLM,
    tp: int | None = None,
    sp: bool = True,
    cp: int = 1,
    cp_mode: CpMode | None = "ulysses",
    cp_ulysses: int | None = None,
    ep: int = 1,
    dp_shard: int | None = None,
    dp_replicate: int = 1,
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, str] | None = None,
    keep_logits: bool = False,
    loss_chunk: int = 4096,
    mlp_tile: int | None = None,
    offload: bool = False,
    kernels: bool = True,
    recompute: Recompute | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    offload_policy: OffloadPolicy | None = None,
    checkpoint: Checkpoint = "hf",
    **kwargs: Any,
) -> Any:
    """``parallelize(model_class.from_pretrained(name_or_path))``, read shard by shard.

    Each rank reads its part of each tensor, straight to its device, and never more than one whole
    tensor. Call it on every rank.

    Args:
        name_or_path: a folder, or a name on the Hub or in its cache; None with ``config`` and
            ``state_dict``.
        model_class: a class of transformers, or an Auto class.
        tp, sp, cp, cp_mode, cp_ulysses, ep, dp_shard, dp_replicate, mesh, plan, keep_logits,
            loss_chunk, mlp_tile, offload, kernels, recompute, mp_policy, offload_policy,
            checkpoint: as for ``parallelize``.
        **kwargs: of transformers' ``from_pretrained``: ``dtype``, ``attn_implementation``,
            ``revision``, ``local_files_only``, ``output_loading_info``, ...

    Returns:
        What ``parallelize`` returns, in eval mode, as transformers loads it. Weights that the
        checkpoint lacks are initialised as transformers would, to the first rank's numbers. With
        ``output_loading_info=True`` a pair, as from transformers.

    Collectives: those of ``parallelize``, and of a few texts and digests.

    Raises:
        ConfigError: an argument that says where weights go, or how they are packed; what
            ``parallelize`` refuses; a checkpoint of another layout than the model.
        PlanError: as from ``parallelize``.
        CheckpointError: the files cannot be read, or are not the same on all ranks.
    """
    options: dict[str, Any] = {
        **{"tp": tp, "sp": sp, "cp": cp, "cp_mode": cp_mode, "ep": ep, "dp_shard": dp_shard},
        **{"dp_replicate": dp_replicate, "mesh": mesh, "plan": plan, "keep_logits": keep_logits},
        **{"loss_chunk": loss_chunk, "kernels": kernels, "recompute": recompute},
        **{
            "cp_ulysses": cp_ulysses,
            "mp_policy": mp_policy,
            "offload_policy": offload_policy,
            "mlp_tile": mlp_tile,
            "offload": offload,
            "checkpoint": checkpoint,
        },
    }
    patches.apply()
    loading = Loading(str(name_or_path), mesh, functools.partial(parallelize, **options))
    with loading, _one_progress_bar():
        _check_arguments(kwargs)
        made = model_class.from_pretrained(name_or_path, **kwargs)
    model = made[0] if isinstance(made, tuple) else made
    _finish(model, loading)
    return made


def _check_arguments(kwargs: Mapping[str, Any]) -> None:
    for name, rule in _REFUSED.items():
        if kwargs.get(name):
            raise ConfigError(
                f"from_pretrained does not take {name}",
                got=f"{name}={kwargs[name]!r}",
                rule=rule,
                remedy=f"leave {name} out",
            )


@contextmanager
def _one_progress_bar() -> Iterator[None]:
    """Inside, the first rank alone shows progress."""
    rank = os.environ.get("RANK", "0")
    if torch.distributed.is_initialized():
        rank = str(torch.distributed.get_rank())
    shown = transformers_logging.is_progress_bar_enabled()
    if rank != "0":
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _finish(model: Any, loading: Loading) -> None:
    """Shard what was made whole, and make the shards memory of their own."""
    state = parallel_state(model)
    assert state is not None
    if untied := loading.tied.keys() - model.all_tied_weights_keys.keys():
        if state.fsdp:
            raise ConfigError(
                "the checkpoint has two values of what the configuration ties",
                where=", ".join(untied),
                rule="FSDP has to know which weights are one before they are read",
                remedy="from_pretrained(..., tie_word_embeddings=False)",
            )
        state.plan = dataclasses.replace(state.plan, tied=False)
    report_taken(agree_on_weights(model, state.everyone, state.mesh.device_type), state)
    made: dict[int, nn.Parameter] = {}
    for name, like in loading.lacking.items():
        p = model.get_parameter(name)
        if not isinstance(p, DTensor):
            cut = shard_like(p.detach(), like, home_of(state))
            made[id(p)] = nn.Parameter(cut, requires_grad=p.requires_grad)
    for module in model.modules():
        for key, p in module._parameters.items():
            module._parameters[key] = made.get(id(p), p)
        for key, buffer in module._buffers.items():
            module._buffers[key] = None if buffer is None else buffer.to(device_of(state))
    # FSDP takes up other parameters than those it has seen when they are moved.
    model._apply(_own_memory)
    _check_replicas(model, state, loading.name)


def _own_memory(x: Tensor) -> Tensor:
    """On a CPU a slice is a view of the mapped file, with its storage and its fate: copy that."""
    own = x.to_local() if isinstance(x, DTensor) else x
    storage = own.untyped_storage()
    return x if storage.resizable() and storage.nbytes() == own.nbytes else x.clone()


def _check_replicas(model: nn.Module, state: ParallelState, name: str) -> None:
    """Refuse ranks that have read other numbers: a stale copy on one machine."""
    replicas = {
        key: p.to_local().detach()
        for key, p in model.named_parameters()
        if isinstance(p, DTensor) and isinstance(p.placements[-1], Replicate)
    }
    differ = differing(list(replicas.values()), state.axis, state.mesh.device_type)
    if differ:
        raise CheckpointError(
            "the ranks have read different checkpoints",
            where=name,
            got=listing(list(replicas)[i] for i in differ),
            rule="every rank reads its part of one checkpoint",
            remedy="copy the files to every machine again",
        )
