"""A shared expert that is a TP block of its own, inside a block whose tokens travel.

HF's code calls it before the experts. Where nobody looks, it runs a little later: while the tokens
are on their way to their experts (``moe/beside.py``). Later or not, the numbers are the same.

Shape letters: T tokens of this rank, H hidden.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.model.block import BlockBoundary, put_hidden, readers, take_hidden
from hf_sp.model.columns import open_entry
from hf_sp.model.linear import ColumnParallelLinear
from hf_sp.model.parameters import LocalParameters
from hf_sp.model.recompute import leave_recipe, recipe_of
from hf_sp.moe.beside import EarlyEntry, LazyShared
from hf_sp.moe.block import SparseBoundary
from hf_sp.moe.flat import unsqueezed
from hf_sp.state import ParallelState
from hf_sp.torch_private import has_global_hooks


class SharedBoundary(BlockBoundary):
    """Entry and exit of the shared expert, on flattened tokens.

    The order of the tokens does not matter to it: it gathers the ranks' ``[T, H]`` as they lie.

    Args:
        state: the model's parallel state.
        linears: the shared expert's column linears.
        around: the block that it is a part of.
        waits: whether that block leaves its output alone until the experts have run.
    """

    def __init__(
        self,
        state: ParallelState,
        linears: list[ColumnParallelLinear],
        around: SparseBoundary,
        waits: bool,
    ) -> None:
        super().__init__(state, linears, attention=False)
        self.around, self.waits = around, waits
        self.forward: SharedForward | None = None

    def install(self, module: nn.Module) -> None:
        """Register the hooks, and around the module's forward one that may wait."""
        super().install(module)
        self.forward = SharedForward(self, module)
        setattr(module, "forward", self.forward)  # noqa: B010 (a method to mypy)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """All-gather ``[T, H]`` to ``[1, tp * T, H]``, or launch that."""
        self.around.mark(module, args)
        x = take_hidden(args, kwargs)
        recipe = recipe_of(x)
        x_1TH = x.unsqueeze(0)
        if recipe is not None:
            leave_recipe(x_1TH, unsqueezed(recipe))
        if not self._may_wait(module):
            return super().enter(module, *put_hidden(args, kwargs, x_1TH))
        entry = EarlyEntry(self.state.axis, True, None, False)
        members = [(linear, linear) for linear in self.linears]
        full = open_entry(entry, x_1TH, members, readers(module))
        self.entries.append(entry)
        return put_hidden(args, kwargs, full)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Reduce-scatter, back to ``[T, H]``; nothing for what does so by itself."""
        if isinstance(output, LazyShared):
            self.entries.pop()
            return None
        out = super().leave(module, args, output)
        return out.squeeze(0) if isinstance(out, Tensor) else out

    def _may_wait(self, module: nn.Module) -> bool:
        """Whether nobody could tell that it runs later."""
        around = self.around.current()
        return (
            not torch.compiler.is_compiling()
            and self.state.sharded
            and around is not None
            and around.waiting is None
            # Else an autograd Function around it (a reentrant checkpoint) will hand out its output.
            and around.grad == torch.is_grad_enabled()
            and self.unseen(module)
        )

    def unseen(self, module: nn.Module) -> bool:
        """Whether nobody has hooks, or a forward of their own, that would notice."""
        return (
            self.waits
            and module.__dict__.get("forward") is self.forward
            and not self._watched(module)
            and not has_global_hooks()
        )

    def _watched(self, module: nn.Module) -> bool:
        """Whether someone else's hooks might read what is gathered, or the output.

        Or write into the tokens while the gather reads them: before the router, or the experts.
        """
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
        watched = [getattr(module, kind) for kind in kinds]
        watched += [self.around.router._forward_pre_hooks, self.around.experts._forward_pre_hooks]
        owners = (getattr(hook, "__self__", None) for hooks in watched for hook in hooks.values())
        return not all(isinstance(owner, BlockBoundary | LocalParameters) for owner in owners)


class SharedForward:
    """A shared expert's forward: at once, or a stand-in where its entry has been opened early."""

    def __init__(self, boundary: SharedBoundary, module: nn.Module) -> None:
        self.boundary, self.module = boundary, module
        self.own = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The partial output, or a stand-in for the whole one."""
        boundary = self.boundary
        entry = boundary.entries[-1] if boundary.entries else None
        if not isinstance(entry, EarlyEntry):
            return self._now(*args, **kwargs)
        around = boundary.around.current()
        assert around is not None, "an entry was opened early outside of the block"
        run = functools.partial(self._now, *args, **kwargs)
        output = LazyShared(take_hidden(args, kwargs), entry, run)
        around.wait_later(output)
        return output

    def unseen(self) -> bool:
        """Whether it may run later, as far as hooks decide it: each rank for itself."""
        return self.boundary.unseen(self.module)

    def _now(self, *args: Any, **kwargs: Any) -> Any:
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def late_shared_experts(model: nn.Module) -> list[bool]:
    """Which shared experts may run later than they are called; the ranks have to be of one mind."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return [forward.unseen() for forward in forwards if isinstance(forward, SharedForward)]
