"""``from_pretrained``: a model that no rank ever holds whole.

transformers builds a model on the meta device and then fills it: a parameter that is a DTensor gets
the part of its own rank alone, read as a slice of the file, after any renaming and conversion.
Between the two ``parallelize`` is called here; how tensors are read is transformers' own.

What a checkpoint lacks is made whole, as transformers initialises it, and is cut afterwards.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.utils import logging as transformers_logging

from hf_sp import checks
from hf_sp.api import CpMode, parallelize
from hf_sp.checkpoint.ranks import Together, listing, ranks_of
from hf_sp.comm.shard import shard_like
from hf_sp.errors import CheckpointError, ConfigError, HfSpError
from hf_sp.model.fsdp import make_buffers
from hf_sp.model.shard import agree_on_weights, device_of, differing, report_taken
from hf_sp.patching import Patch, Patches
from hf_sp.state import ParallelState, Recompute, parallel_state

_QUANTISED = "packed weights cannot be cut into shards (QLoRA: not in this release)"
_PLACED = "each rank reads its own shards, straight to its device"
_NATIVE = "hf_sp shards the model; transformers must not do it too"
# Arguments of transformers' from_pretrained that say otherwise -> the rule that they break.
_REFUSED = {
    **dict.fromkeys(
        ("quantization_config", "load_in_8bit", "load_in_4bit", "gguf_file"), _QUANTISED
    ),
    **dict.fromkeys(("device_map", "max_memory", "offload_folder", "offload_buffers"), _PLACED),
    **dict.fromkeys(("distributed_config", "device_mesh", "tp_plan", "tp_size"), _NATIVE),
    **dict.fromkeys(
        ("use_kernels", "kernel_config"),
        "transformers' kernels would replace forwards that hf_sp has replaced",
    ),
}
# Conversions whose result's shard is the result of shards: one tensor for each expert, stacked, and
# gate beside up.
_BY_SHARDS = (("MergeModulelist",), ("MergeModulelist", "Concatenate"))


def from_pretrained(  # noqa: D417 (they are documented by parallelize)
    name_or_path: str | os.PathLike[str],
    *,
    model_class: Any = AutoModelForCausalLM,
    tp: int | None = None,
    sp: bool = True,
    cp: int = 1,
    cp_mode: CpMode = "ulysses",
    ep: int = 1,
    dp_shard: int | None = None,
    dp_replicate: int = 1,
    mesh: DeviceMesh | None = None,
    plan: Mapping[str, str] | None = None,
    keep_logits: bool = False,
    loss_chunk: int = 4096,
    kernels: bool = True,
    recompute: Recompute | None = None,
    **kwargs: Any,
) -> Any:
    """``parallelize(model_class.from_pretrained(name_or_path))``, read shard by shard.

    Each rank reads its part of each tensor, straight to its device, and never more than one whole
    tensor. Call it on every rank.

    Args:
        name_or_path: a folder, or a name on the Hub or in its cache.
        model_class: a class of transformers, or an Auto class.
        tp, sp, cp, cp_mode, ep, dp_shard, dp_replicate, mesh, plan, keep_logits, loss_chunk,
            kernels, recompute: as for ``parallelize``.
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
    options = {
        **{"tp": tp, "sp": sp, "cp": cp, "cp_mode": cp_mode, "ep": ep, "dp_shard": dp_shard},
        **{"dp_replicate": dp_replicate, "mesh": mesh, "plan": plan, "keep_logits": keep_logits},
        **{"loss_chunk": loss_chunk, "kernels": kernels, "recompute": recompute},
    }
    patches.apply()
    with _Loading(str(name_or_path), options) as loading, _one_progress_bar():
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


@dataclass
class _Loading:
    """One call of ``from_pretrained``, from the inside of transformers' own."""

    name: str
    options: dict[str, Any]
    met: bool = False  # the ranks have agreed on what they load
    # Parameters that the checkpoint lacks -> what they will be.
    lacking: dict[str, DTensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def __enter__(self) -> _Loading:
        self.before = _loading.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _loading.reset(self.before)
        if self.met or not isinstance(error, Exception):
            return
        # The others wait for this rank, and are told.
        told = error if isinstance(error, HfSpError) else _unread(self.name, error)
        try:
            self.agree(told, {})
        except HfSpError as raised:
            if raised is not told:
                raise

    def agree(self, problem: HfSpError | None, settings: dict[str, str]) -> None:
        self.met = True
        rule = "every rank calls from_pretrained with the same checkpoint and arguments"
        mesh = self.options["mesh"]
        checks.agree(mesh, problem, settings, "the ranks were given different checkpoints", rule)


def _unread(name: str, error: Exception) -> CheckpointError:
    got = f"{type(error).__name__}: {error}"
    return CheckpointError("a model could not be loaded", where=name, got=got)


_loading: ContextVar[_Loading | None] = ContextVar("hf_sp_loading", default=None)
patches = Patches(lambda model: _loading.get() is not None)


@patches.on(modeling_utils, "convert_and_load_state_dict_in_model")
def parallelize_and_load(
    original: Patch,
    model: Any,
    state_dict: dict[str, Any],
    load_config: Any,
    disk_offload_index: dict[str, Any] | None = None,
) -> Any:
    """Shard between the build and the load: transformers knows its own plans only (5.17 to 5.24).

    The model is on meta, and ``state_dict`` has slices that are read when they are indexed.
    """
    loading = _loading.get()
    assert loading is not None
    problem: HfSpError | None = None
    try:
        _check_checkpoint(loading, model, state_dict, load_config)
    except HfSpError as error:
        problem = error
    loading.agree(problem, {key: f"{_shape(x)} {_dtype(x)}" for key, x in state_dict.items()})
    # transformers ties once all is loaded. FSDP has to know before.
    model.tie_weights(recompute_mapping=False)
    parallelize(model, **loading.options)
    state = parallel_state(model)
    assert state is not None
    placed = {"": device_of(state)}
    # Frozen, and read again when what is missing is made.
    object.__setattr__(load_config, "device_map", placed)
    ranks = ranks_of(model)
    whole = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    loading.tied = dict(model.all_tied_weights_keys)
    with Together(ranks, "a checkpoint cannot be read", loading.name):
        info, index = original(model, state_dict, load_config, disk_offload_index)
    everyone = ranks.gather((info.missing_keys, info.mismatched_keys, info.conversion_errors))
    for missing, mismatched, errors in everyone:
        info.missing_keys |= missing
        info.conversion_errors = {**errors, **info.conversion_errors}
        # A shape may fit one rank's shard and not the next one's.
        info.mismatched_keys |= mismatched
    wrong = {name: shape for name, shape, _ in sorted(info.mismatched_keys, key=str)}
    info.mismatched_keys = {
        (name, tuple(_shape(state_dict[name])) if name in state_dict else tuple(shape), whole[name])
        for name, shape in wrong.items()
    }
    for name in (info.missing_keys | set(wrong)) - model.all_tied_weights_keys.keys():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        meant = module._parameters.get(last)
        if meant is not None:
            loading.lacking[name] = meant
            empty = torch.empty(meant.shape, dtype=meant.dtype, device="meta")
            module._parameters[last] = nn.Parameter(empty, requires_grad=meant.requires_grad)
            # Drawn from the generator that an unsharded model's would be drawn from.
            placed[name] = torch.device("cpu")
    return info, index


def _check_checkpoint(
    loading: _Loading, model: Any, state_dict: dict[str, Any], load_config: Any
) -> None:
    """Refuse what cannot be read shard by shard, before anything is read."""
    if loading.met:
        raise ConfigError(
            "from_pretrained was given an adapter, or a model that loads another",
            where=loading.name,
            rule="one checkpoint is loaded, of one model",
            remedy="load the base model, then PeftModel.from_pretrained(model, adapter)",
        )
    if load_config.is_quantized:
        raise ConfigError(
            f"{type(model).__name__} has quantised weights",
            where=loading.name,
            got=type(load_config.hf_quantizer).__name__,
            rule=_QUANTISED,
            remedy="load a checkpoint in bf16; tp already divides its weights over the ranks",
        )
    # Asking for a new name marks a conversion as used, which decides what is saved.
    for conversion in copy.deepcopy(load_config.weight_mapping or []):
        steps = tuple(type(step).__name__ for step in getattr(conversion, "operations", ()))
        if not steps or steps in _BY_SHARDS:
            continue
        met = [key for key in state_dict if conversion.rename_source_key(key)[1] is not None]
        if met:
            raise ConfigError(
                "the checkpoint has another layout than the model",
                where=listing(met),
                got=", ".join(steps),
                rule="a rank reads its part of each tensor; transformers converts these whole",
                remedy="parallelize(model_class.from_pretrained(...)), and save_pretrained once",
            )


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape if isinstance(x, Tensor) else x.get_shape())


def _dtype(x: Any) -> str:
    return str(x.dtype if isinstance(x, Tensor) else x.get_dtype())


def _finish(model: Any, loading: _Loading) -> None:
    """Shard what was made whole, and make the shards memory of their own."""
    state = parallel_state(model)
    assert state is not None
    if untied := loading.tied.keys() - model.all_tied_weights_keys.keys():
        if state.data > 1:
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
            cut = shard_like(p.detach(), like, device_of(state))
            made[id(p)] = nn.Parameter(cut, requires_grad=p.requires_grad)
    for module in model.modules():
        for key, p in module._parameters.items():
            module._parameters[key] = made.get(id(p), p)
    # On a CPU a slice is a view of the mapped file: with its storage, and its fate. FSDP takes up
    # other parameters than those it has seen when they are moved.
    model._apply(torch.clone if state.mesh.device_type == "cpu" else lambda x: x)
    _check_replicas(model, state, loading.name)
    if state.data > 1:
        make_buffers(model, state)


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
