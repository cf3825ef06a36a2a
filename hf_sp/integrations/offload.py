"""Where transformers keeps the function that checkpoints a layer, for ``offload=True``.

It is set when checkpointing is switched on, by the user or by Trainer, and so is looked at as a
forward begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_sp.errors import ConfigError
from hf_sp.model.offload import HostInputs
from hf_sp.state import ParallelState

_FUNCTION = "_gradient_checkpointing_func"


class _Checkpoint:
    """In the place of a layer's checkpoint function."""

    def __init__(self, inputs: HostInputs, function: Any) -> None:
        self.inputs, self.function = inputs, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inputs.call(self.function, *args, **kwargs)


class Offload:
    """Hook of the decoder: as a forward begins, have the layers' checkpoints called through ours.

    Raises, in a forward that records gradients in training:
        ConfigError: no layer is checkpointed.
    """

    def __init__(self, model: nn.Module, state: ParallelState) -> None:
        self.model, self.plan, self.inputs = model, state.plan, HostInputs()

    def install(self) -> None:
        """Register it."""
        self.model.get_submodule(self.plan.decoder).register_forward_pre_hook(self.start)

    def start(self, decoder: nn.Module, args: Any) -> None:
        """Look at the layers."""
        if not (decoder.training and torch.is_grad_enabled()):
            return
        layers = [self.model.get_submodule(path) for path in self.plan.layers]
        on = [one for one in layers if getattr(one, "gradient_checkpointing", False)]
        if not on:
            raise ConfigError(
                "offload=True has nothing to move",
                got="no layer is checkpointed",
                rule="it moves the inputs of checkpointed layers to the host's memory",
                remedy="model.gradient_checkpointing_enable(), or "
                "TrainingArguments(gradient_checkpointing=True)",
            )
        for layer in on:
            function = getattr(layer, _FUNCTION)
            if not isinstance(function, _Checkpoint):
                setattr(layer, _FUNCTION, _Checkpoint(self.inputs, function))
