"""Models to compare, whole or with one of their layers: the others pass hidden states on.

Must not know parallel models. A piece has the modules and the config of the whole, so that masks,
positions and what depends on a layer's index are the whole's; its weights are one layer's alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from hf_sp.loading import load_config
from hf_sp.plan import Plan
from hf_sp.plan.experts import is_experts
from hf_sp.plan.families import plan_strings
from hf_sp.proof.reference import scatter_weights, without_dropout
from hf_sp.proof.runs import core_of


@dataclass
class Source:
    """Where a model is from.

    Args:
        config: its config.
        name: a folder, or a name in the local cache, that has its weights.
        model: the model itself; it stays as it is.
        dtype: what it is to compute in.
    """

    config: PreTrainedConfig
    name: str | None = None
    model: nn.Module | None = None
    dtype: torch.dtype = torch.float64
    own: bool = False  # nobody else has the model

    def __post_init__(self) -> None:
        self.changed: list[str] = []
        """Dropouts that were set to zero."""
        self.returned = 0
        """Things in the tuple that a decoder layer returns, 0: none. Known once one has run."""

    @functools.cached_property
    def shapes(self) -> Any:
        """The model on meta, without adapters."""
        if self.model is not None:
            return core_of(self.model)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(self.config))

    @property
    def numbers(self) -> int:
        """Of all its weights."""
        return sum(p.numel() for p in (self.model or self.shapes).parameters())

    def numbers_of(self, plan: Plan) -> int:
        """Weights of the largest piece: the first layer with the ends, or a later one."""
        sizes = [
            sum(p.numel() for p in _at(self.shapes, path).parameters()) for path in plan.layers
        ]
        whole = sum(p.numel() for p in self.shapes.parameters())
        return max(whole - sum(sizes[1:]), *sizes)

    def whole(self) -> nn.Module:
        """All of it."""
        if self.model is None:
            return self._ready(self._load(type(self.shapes)), 0)
        return self._ready(self.model if self.own else copy.deepcopy(self.model))

    def piece(self, plan: Plan, layer: int) -> nn.Module:
        """One layer, the first one with the ends of the stack, in training."""
        if self.model is not None:
            return self._ready(self._copied(self.model, plan, layer))
        kind = type(self.shapes)

        def make(model: Any, *args: Any, **kwargs: Any) -> None:
            kind.__init__(model, *args, **kwargs)
            self._keep(model, plan, layer)

        own = {"__init__": make, "__module__": kind.__module__}
        piece = self._ready(self._load(type(kind.__name__, (kind,), own)), layer)
        for path in _ends(plan) if layer else ():
            for p in _at(piece, path).parameters():
                nn.init.zeros_(p)  # the ranks' generators differ
        return piece

    def _load(self, kind: Any) -> nn.Module:
        how: dict[str, Any] = {"config": copy.deepcopy(self.config), "dtype": self.dtype}
        # What a piece lacks is no news.
        level, bars = (
            transformers_logging.get_verbosity(),
            transformers_logging.is_progress_bar_enabled(),
        )
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            if self.name is None:
                return kind.from_pretrained(None, state_dict={}, **how)
            how |= {"ignore_mismatched_sizes": True, "local_files_only": True}
            return kind.from_pretrained(self.name, **how)
        finally:
            transformers_logging.set_verbosity(level)
            if bars:
                transformers_logging.enable_progress_bar()

    def _copied(self, model: nn.Module, plan: Plan, layer: int) -> nn.Module:
        core = core_of(model)
        memo: dict[int, Any] = {}
        for i, path in enumerate(plan.layers):
            if i != layer:
                memo |= {id(p): nn.Parameter(p.new_empty(0)) for p in _at(core, path).parameters()}
        for path in _ends(plan) if layer else ():
            for p in _at(core, path).parameters():
                memo[id(p)] = nn.Parameter(p.detach()[: plan.tp].clone())
        piece = copy.deepcopy(model, memo)
        self._keep(core_of(piece), plan, layer)
        return piece

    def _ready(self, model: Any, seed: int | None = None) -> nn.Module:
        if seed is not None and self.name is None:
            scatter_weights(model, seed)
        model = model.to(self.dtype)
        self.changed = [*dict.fromkeys([*self.changed, *without_dropout(model)])]
        if hasattr(model, "set_experts_implementation"):
            # The definition; HF's grouped has no float64.
            model.set_experts_implementation("eager")
        return model.train()

    def _keep(self, model: nn.Module, plan: Plan, layer: int) -> None:
        """Leave one layer, and a row for each rank of a vocabulary that it does not meet."""
        for i, path in enumerate(plan.layers):
            if i != layer:
                self._empty(_at(model, path))
        made: dict[int, nn.Parameter] = {}
        for path in _ends(plan) if layer else ():
            module: Any = _at(model, path)
            for name, p in list(module.named_parameters(recurse=False)):
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(p.detach()[: plan.tp].clone())
                setattr(module, name, made[id(p)])
            for size in ("num_embeddings", "out_features"):
                if hasattr(module, size):
                    setattr(module, size, plan.tp)
            if hasattr(module, "padding_idx"):
                module.padding_idx = None

    def _empty(self, layer: Any) -> None:
        """Take a layer's weights; what the decoder's loop asks it for stays."""
        forward = layer.forward

        @functools.wraps(forward)
        def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            beside = (None,) * (self.returned - 1)
            return (hidden_states, *beside) if self.returned else hidden_states

        own = [*layer.named_children(), *layer.named_parameters(recurse=False)]
        for name, _ in [*own, *layer.named_buffers(recurse=False)]:
            delattr(layer, name)
        layer.forward = pass_on


Given = nn.Module | str | PathLike[str] | PreTrainedConfig | Callable[[], nn.Module] | Source


def source_of(given: Given, dtype: torch.dtype) -> Source:
    """Where a model is from, of what ``verify`` is given.

    Raises:
        ConfigError: a name that is not there.
    """
    if isinstance(given, Source):
        return given
    if isinstance(given, PreTrainedConfig):
        return Source(given, dtype=dtype)
    if isinstance(given, str | PathLike):
        config = load_config(given)
        return Source(config, name=str(given), dtype=dtype)
    model = given if isinstance(given, nn.Module) else cast(Callable[[], nn.Module], given)()
    return Source(cast(Any, model).config, model=model, dtype=dtype, own=model is not given)


def plan_of_piece(piece: nn.Module, styles: Mapping[str, str] | None) -> dict[str, str]:
    """The plan strings that mean something in a piece: of layers of another kind there are none."""
    core = core_of(piece)
    modules = dict(core.named_modules())
    names = [*modules, *(name for name, _ in core.named_parameters(remove_duplicate=False))]
    known = {_starred(name) for name in names}
    # A sparse block has the names of the dense one in its shared expert, or nowhere.
    known_inside = {_starred(n).rpartition(".")[0] for n, m in modules.items() if is_experts(m)}

    def means(key: str, style: str) -> bool:
        inside = any(key.startswith(f"{block}.") for block in known_inside)
        return inside or key in known or ".*." not in key or style == "sequence"

    given = plan_strings(core) if styles is None else styles
    return {key: style for key, style in given.items() if means(key, style)}


def _starred(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


@contextlib.contextmanager
def freed() -> Iterator[None]:
    """What was made inside and is not held is gone afterwards: hooks are cycles."""
    try:
        yield
    finally:
        gc.collect()


def _at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def _ends(plan: Plan) -> list[str]:
    return [path for path in (plan.embedding, *plan.embeddings, plan.head) if path is not None]
