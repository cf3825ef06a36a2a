"""The inside of transformers' ``from_pretrained``: between the build on meta and the load.

A parameter that is a DTensor by then gets the part of its own rank alone. How tensors are renamed,
converted and read is transformers' own.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import modeling_utils
from transformers.core_model_loading import WeightConverter
from transformers.distributed.sharding_utils import DtensorShardOperation

from hf_sp import checks
from hf_sp.checkpoint.ranks import Together, listing, ranks_of
from hf_sp.errors import CheckpointError, ConfigError, HfSpError
from hf_sp.model.shard import home_of
from hf_sp.patching import Patch, Patches
from hf_sp.state import parallel_state
from hf_sp.torch_packed import is_unequal, packed_sizes

QUANTISED = "packed weights cannot be cut into shards (QLoRA: not in this release)"
_SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"
# Conversions whose result's shard is the result of shards: one tensor for each expert, stacked, and
# gate beside up.
_BY_SHARDS = (("MergeModulelist",), ("MergeModulelist", "Concatenate"))
_STACK = [("MergeModulelist", 0), ("Concatenate", 1)]


@contextmanager
def _one_by_one() -> Iterator[None]:
    """Inside, transformers reads a tensor when it is due, and not all of them ahead in threads.

    Converted from another dtype, or one of many experts, they would lie about on the host. Other
    ranks read beside this one.
    """
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        del os.environ[_SWITCH]
        if before is not None:
            os.environ[_SWITCH] = before


@dataclass
class Loading:
    """One call of ``from_pretrained``, from the inside of transformers' own."""

    name: str
    mesh: DeviceMesh | None
    parallelize: Callable[[Any], Any]
    met: bool = False  # the ranks have agreed on what they load
    # Parameters that the checkpoint lacks -> what they will be.
    lacking: dict[str, DTensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    # What is being loaded -> the shapes of this rank's parts.
    parts: dict[str, torch.Size] = field(default_factory=dict)

    def __enter__(self) -> Loading:
        self.before = loading_now.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        loading_now.reset(self.before)
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
        """Raise on every rank if one has a problem, or if their checkpoints differ."""
        self.met = True
        what = "the ranks were given different checkpoints"
        rule = "every rank calls from_pretrained with the same checkpoint and arguments"
        checks.agree(self.mesh, problem, settings, what, rule)


def _unread(name: str, error: Exception) -> CheckpointError:
    got = f"{type(error).__name__}: {error}"
    return CheckpointError("a model could not be loaded", where=name, got=got)


loading_now: ContextVar[Loading | None] = ContextVar("hf_sp_loading", default=None)
patches = Patches(lambda model: loading_now.get() is not None)


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
    loading = loading_now.get()
    assert loading is not None
    problem: HfSpError | None = None
    try:
        _check_checkpoint(loading, model, state_dict, load_config)
    except HfSpError as error:
        problem = error
    loading.agree(problem, {key: f"{_shape(x)} {_dtype(x)}" for key, x in state_dict.items()})
    # transformers ties once all is loaded. FSDP has to know before.
    model.tie_weights(recompute_mapping=False)
    loading.parallelize(model)
    state = parallel_state(model)
    assert state is not None
    placed = {"": home_of(state)}
    # Frozen, and read again when what is missing is made.
    object.__setattr__(load_config, "device_map", placed)
    ranks = ranks_of(model)
    whole = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    loading.tied = dict(model.all_tied_weights_keys)
    placements = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
    loading.parts = {name: p.to_local().shape for name, p in placements.items()}
    with Together(ranks, "a checkpoint cannot be read", loading.name), _one_by_one():
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


@patches.on(WeightConverter, "convert")
def stack_where_it_stays(
    original: Patch, self: WeightConverter, layer_name: str, *args: Any, **kwargs: Any
) -> dict[str, Tensor]:
    """Stacking lists of experts, and stacks side by side, takes twice their memory (5.17 to 5.24).

    Each is read into its place instead.
    """
    loading = loading_now.get()
    assert loading is not None
    shape = loading.parts.get(layer_name)
    whole = None if shape is None else _stacked(self, shape)
    if whole is None:
        # It does not fit: transformers says what is wrong.
        return original(self, layer_name, *args, **kwargs)
    self.collected_tensors.clear()
    return {layer_name: whole}


@patches.on(DtensorShardOperation, "_compute_strided_slice")
def slices_of_unequal_parts(
    original: Patch,
    self: DtensorShardOperation,
    intervals: list[tuple[int, int]],
    rank: int,
    world_size: int,
    split_factor: int,
) -> list[tuple[int, int]]:
    """Several tensors packed in one are taken for tensors of one size (5.17 to 5.24)."""
    if not is_unequal(split_factor):
        return original(self, intervals, rank, world_size, split_factor)
    found: list[tuple[int, int]] = []
    for start, end in intervals:
        for size in packed_sizes(split_factor, end - start):
            found += original(self, [(start, start + size)], rank, world_size, 1)
            start += size
    return found


def _stacked(conversion: WeightConverter, shape: torch.Size) -> Tensor | None:
    """``[e, n f, ...]`` of ``n`` kinds of tensors ``[f, ...]``, one for each of ``e`` experts."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in conversion.operations]
    kinds = [conversion.collected_tensors.get(p, []) for p in conversion.source_patterns]
    if steps != _STACK[: len(steps)] or (len(kinds) > 1) != (len(steps) > 1):
        return None
    whole: Tensor | None = None
    for kind, reads in enumerate(kinds):
        # Experts of other ranks are not read.
        pieces = (piece for read in reads if callable(read) and (piece := read()) is not None)
        expert = -1
        for expert, piece in enumerate(pieces):
            height = piece.shape[0]
            if expert >= shape[0] or (height * len(kinds), *piece.shape[1:]) != shape[1:]:
                return None
            if whole is None:
                whole = piece.new_empty(shape)
            whole[expert, kind * height : (kind + 1) * height] = piece
        if expert + 1 != shape[0]:
            return None
    return whole


def _check_checkpoint(
    loading: Loading, model: Any, state_dict: dict[str, Any], load_config: Any
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
            rule=QUANTISED,
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
