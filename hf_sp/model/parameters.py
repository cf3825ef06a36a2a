"""Show a module its DTensor parameters as local tensors while it runs.

HF's norms read ``self.weight`` and mix it with plain activations. During the module's forward an
entry of that name in the instance's ``__dict__`` shadows the registered parameter (attribute lookup
asks ``__dict__`` first; ``state_dict`` and ``named_parameters`` read ``_parameters`` and see no
change). So any form of norm works, unmodified, and no class is replaced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_sp.comm import pairs
from hf_sp.model.local import local
from hf_sp.state import ParallelState

PARTIAL = "_hf_sp_partial"
"""Attribute of a module in a TP block whose whole weight each rank uses on its own part."""


class LocalParameters:
    """Forward hooks of one module with replicated parameters.

    Args:
        state: the model's parallel state.
        partial: when the gradient is partial and has to be summed over tp: ``"always"`` (each rank
            uses the weight on its own heads), ``"sharded"`` (on its sequence shard, under sp),
            ``"in decoder"`` (the same, but only while the decoder runs: the final norm is called by
            others too, on whole hidden states), ``"never"`` (every rank computes the same).

    Collectives: none forward, one all-reduce of each parameter's gradient backward if partial. The
    sum is inside the graph, so that it happens once per micro-batch, before accumulation.
    """

    def __init__(self, state: ParallelState, partial: str) -> None:
        self.state, self.partial = state, partial

    def install(self, module: nn.Module) -> None:
        """Register the hooks. The second runs even if the forward raises."""
        setattr(module, PARTIAL, self.partial == "always")
        module.register_forward_pre_hook(self.show, prepend=True)
        module.register_forward_hook(self.hide, prepend=True, always_call=True)

    def summed(self) -> bool:
        """Whether gradients of the current forward are partial."""
        state = self.state
        return {
            "always": True,
            "sharded": state.sp,
            "in decoder": state.sharded and state.length is not None,
            "never": False,
        }[self.partial]

    @contextlib.contextmanager
    def shown(self, module: nn.Module) -> Iterator[None]:
        """Shadow the parameters inside, for a forward that is called without its hooks."""
        self.show(module, ())
        try:
            yield
        finally:
            self.hide(module, (), None)

    def show(self, module: nn.Module, args: Any) -> None:
        """Shadow the parameters with their local tensors."""
        state, summed = self.state, self.summed()
        for name, p in module._parameters.items():
            if p is None:
                continue
            tensor = local(p)
            if summed and p.requires_grad and torch.is_grad_enabled():
                tensor = pairs.identity_allreduce(tensor, state.axis)
            module.__dict__[name] = tensor

    def hide(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give the registered parameters back."""
        for name in module._parameters:
            module.__dict__.pop(name, None)
