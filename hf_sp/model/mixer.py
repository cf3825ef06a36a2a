"""Linear attentions and state-space models on a rank's own heads, with transformers' own forward.

Shape letters: B batch, S sequence, s this rank's tokens of it, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_sp.comm.parts import Parts
from hf_sp.model.block import (
    BlockBoundary,
    get_hidden_states,
    replace_hidden_states,
    true_length,
)
from hf_sp.model.columns import ColumnLinear
from hf_sp.model.mixer_groups import NormOverGroups, SharedGroups, place
from hf_sp.model.mixer_input import AppliedFactor, AppliedMask, masked, multiplied
from hf_sp.model.parameters import LocalParameters, Partial
from hf_sp.model.ports import BlockInput
from hf_sp.plan.schema import Block, Mixer, OwnRows, own_size
from hf_sp.state import ParallelState

CACHES = ("cache", "cache_params", "past_key_values")
"""What transformers calls the cache of a mixer, the newest name first."""


class OwnRowsParameters(LocalParameters):
    """Shows the rows of a rank's heads of parameters that are stored whole.

    The mixer reads its convolution's weight itself: what is shown, is shown while the mixer runs.
    Their gradients are summed over the ranks, with those of the layer's norms.
    """

    def __init__(self, state: ParallelState, module: nn.Module, own: Sequence[OwnRows]) -> None:
        super().__init__(state, Partial.HEADS)
        self.module, self.own = module, own

    def show(self, module: nn.Module, args: Any) -> None:
        """Shadow the parameters with this rank's rows."""
        super().show(self.module, args)
        shown, ranks = self.module.__dict__, place(self.state)
        for one in self.own:
            whole = shown.get(one.name)
            whole = self.module.get_buffer(one.name) if whole is None else whole
            parts = [whole.narrow(one.dim, *stretch) for stretch in one.rows(*ranks)]
            shown[one.name] = parts[0] if len(parts) == 1 else torch.cat(parts, one.dim)

    def hide(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give the registered parameters, and buffers, back."""
        for one in self.own:
            self.module.__dict__.pop(one.name, None)
        super().hide(self.module, args, output)


def install_own_rows(
    model: nn.Module, block: Block, state: ParallelState
) -> dict[str, tuple[nn.Module, LocalParameters]]:
    """Hooks that show a mixer its own rows; the modules that own them by path."""
    own: dict[str, list[OwnRows]] = {}
    for one in block.mixer.own if block.mixer else ():
        own.setdefault(one.module, []).append(one)
    owners: dict[str, tuple[nn.Module, LocalParameters]] = {}
    for path, of_module in own.items():
        module = model.get_submodule(path)
        parameters = OwnRowsParameters(state, module, of_module)
        parameters.install(model.get_submodule(block.path))
        owners[path] = module, parameters
    return owners


class Exchange(Protocol):
    """Shows a mixer all tokens of its heads, where the sequence is cut over cp ranks."""

    def show(self, x: Tensor, length: int, parts: Parts) -> Tensor:
        """What stands for the whole of an input, of which ``x`` is this rank's part."""


class MixerBoundary(BlockBoundary):
    """Entry and exit hooks of a mixer.

    A padding mask is multiplied into the shard, before it is gathered: what the mixer multiplies
    is a tensor of its own, of the whole sequence.
    """

    exchange: Exchange | None = None

    def __init__(
        self, state: ParallelState, block: BlockInput, linears: Sequence[ColumnLinear], plan: Block
    ) -> None:
        super().__init__(state, block, linears, attention=True)
        assert plan.mixer is not None
        self.plan: Mixer = plan.mixer
        self.own = _without_cache

    def install(self, module: nn.Module) -> None:
        """Register both hooks, and tell the mixer how much of everything it has on this rank."""
        super().install(module)
        _Unfused().install(module)
        plan, state = self.plan, self.state
        for path, _ in plan.norms:
            NormOverGroups.install(module.get_submodule(path), state)
        self.factor = module.__dict__[plan.factor] if plan.factor else None
        if self.factor is not None:
            setattr(module, plan.factor, AppliedFactor())
        self.counts = _Counts(module, plan)
        self.counts(state.tp)
        self.module = module
        self.shared = {
            name: SharedGroups(state.axis, segments)
            for name, segments in plan.columns
            if any(count % state.tp for count, _ in segments)
        }

    def note(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook of the layer: a mixer is given no positions, but its layer is."""
        self.length = true_length(kwargs)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """All-gather the input as the mixer would change it, for its column linears."""
        state = self.state
        if state.parts is not None:
            self.counts(place(state)[0])
        where = state.cut, state.axis if state.sharded else None
        x = masked(get_hidden_states(args, kwargs), kwargs.get("attention_mask"), where)
        x = x if self.factor is None else multiplied(x, self.factor)
        args, kwargs = replace_hidden_states(args, kwargs, x)
        return self._hand_over(*super().enter(module, args, kwargs))

    def _hand_over(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The mixer's arguments, with what has been gathered."""
        x = get_hidden_states(args, kwargs)
        shown, children = self.module.__dict__, self.module._modules
        for name, shared in self.shared.items():
            shown[name] = Shown(children[name], shared.of)
        if self.state.cut is not None:
            assert self.exchange is not None
            assert self.length is not None
            x = self.exchange.show(x, self.length, self.state.cut)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            kwargs = {**kwargs, "attention_mask": AppliedMask(mask, x)}
        return replace_hidden_states(args, kwargs, x)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Reduce the partial output."""
        for name in children_shown(module):
            del module.__dict__[name]
        return super().leave(module, args, output)


def _without_cache(kwargs: dict[str, Any], length: int, parts: Parts) -> dict[str, Any]:
    """The mixer's arguments in a forward that is cut: those that ask for a cache are not."""
    return {**kwargs, **{name: None for name in CACHES if kwargs.get(name) is not None}}


class _Counts:
    """Tells a mixer, its convolution and its norm how much of everything they have here."""

    def __init__(self, module: nn.Module, plan: Mixer) -> None:
        self.ranks = 1
        self.told = [(module.get_submodule(p).__dict__, name, of) for p, name, of in plan.counts]

    def __call__(self, ranks: int) -> None:
        if ranks != self.ranks:
            self.ranks = ranks
            for attributes, name, segments in self.told:
                attributes[name] = own_size(segments, ranks)


class Shown:
    """Stands where a linear of a mixer does, while the mixer runs.

    It is found in the mixer's ``__dict__`` (attribute lookup asks that first), so that whatever
    wraps the linear, an adapter too, computes as it always does.
    """

    def __init__(self, module: Any, function: Callable[[Any, Tensor], Tensor]) -> None:
        self.module, self.function = module, function

    def __call__(self, x: Tensor) -> Tensor:
        """What stands there, of the linear and its input."""
        return self.function(self.module, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


def children_shown(module: nn.Module) -> list[str]:
    """Names of the children in whose place something stands."""
    return [name for name, one in module.__dict__.items() if type(one) is Shown]


class _Unfused:
    """Hooks around a mixer: Mamba-2 asks whether it trains, to hand all to one kernel.

    That kernel would be given the weights of its norm and its row linear past their own forwards.
    """

    training = False

    def install(self, module: nn.Module) -> None:
        """Register both. The second also runs, to clean up, if the forward raises."""
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave, prepend=True, always_call=True)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Its children stay as they are."""
        self.training, module.training = module.training, False

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """As it was."""
        module.training = self.training
