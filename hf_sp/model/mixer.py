"""Linear attentions on a rank's own heads, with transformers' own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_sp.model.block import BlockBoundary, true_length
from hf_sp.model.parameters import LocalParameters, Partial
from hf_sp.plan.schema import Block, Mixer
from hf_sp.state import ParallelState

Stretches = tuple[tuple[int, int], ...]


class OwnRowsParameters(LocalParameters):
    """Shows the rows of a rank's heads of parameters that are stored whole.

    The mixer reads its convolution's weight itself: what is shown, is shown while the mixer runs.
    Their gradients are summed over the ranks, with those of the layer's norms.
    """

    def __init__(self, state: ParallelState, module: nn.Module, rows: dict[str, Stretches]) -> None:
        super().__init__(state, Partial.HEADS)
        self.module, self.rows = module, rows

    def show(self, module: nn.Module, args: Any) -> None:
        """Shadow the parameters with this rank's rows."""
        super().show(self.module, args)
        shown = self.module.__dict__
        for name, rows in self.rows.items():
            parts = [shown[name].narrow(0, *stretch) for stretch in rows]
            shown[name] = parts[0] if len(parts) == 1 else torch.cat(parts)

    def hide(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give the registered parameters back."""
        super().hide(self.module, args, output)


def install_own_rows(
    model: nn.Module, block: Block, state: ParallelState
) -> dict[str, tuple[nn.Module, LocalParameters]]:
    """Hooks that show a mixer its own rows; the modules that own them by path."""
    rows: dict[str, dict[str, Stretches]] = {}
    for one in block.mixer.own if block.mixer else ():
        rows.setdefault(one.module, {})[one.name] = one.rows(state.tp, state.rank)
    owners: dict[str, tuple[nn.Module, LocalParameters]] = {}
    for path, of_module in rows.items():
        module = model.get_submodule(path)
        parameters = OwnRowsParameters(state, module, of_module)
        parameters.install(model.get_submodule(block.path))
        owners[path] = module, parameters
        if isinstance(module, nn.Conv1d):
            channels = sum(count for _, count in of_module["weight"])
            module.in_channels = module.out_channels = module.groups = channels
    return owners


def install_mixer(
    module: nn.Module, mixer: Mixer, boundary: BlockBoundary, layer: nn.Module
) -> None:
    """Tell a mixer how much of everything it has on this rank, and its boundary how long x is."""
    for name in mixer.counts:
        setattr(module, name, module.__dict__[name] // boundary.state.tp)
    layer.register_forward_pre_hook(_LayerLength(boundary).note, with_kwargs=True)
    _Unfused().install(module)


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


class _LayerLength:
    """A hook of a decoder layer: a mixer is given no positions, but its layer is."""

    def __init__(self, boundary: BlockBoundary) -> None:
        self.boundary = boundary

    def note(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Remember the length of the whole sequence for the block in this layer."""
        self.boundary.length = true_length(kwargs)
