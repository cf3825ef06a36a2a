"""Groups of a state-space model's heads that are on several ranks: shared features, and norms.

Shape letters: B batch, S sequence, o and n features here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.comm.collectives import Axis
from hf_sp.plan.known_forms import GatedNormForm, gated_norm_form
from hf_sp.plan.schema import Segments
from hf_sp.state import ParallelState


def place(state: ParallelState) -> tuple[int, int]:
    """How many ranks have heads of their own in the current forward, and which of them this is.

    The context parallel ranks of a tp rank share its heads among them.
    """
    if state.cut is None:
        return state.tp, state.rank
    axis = state.cut.axis
    return state.tp * axis.size, state.rank * axis.size + axis.rank


class SharedGroups:
    """What the heads of a group share, where the ranks are more than groups.

    Of a linear's output each rank has made a part of these features; it needs all of them.

    Shapes:   [B, S, o] -> [B, S, o + n (tp - 1) m], of n shared segments, m features here each
    Forward:  1 all-gather of these features
    Backward: 1 reduce-scatter of their gradients, which are partial
    Saves:    nothing
    """

    def __init__(self, axis: Axis, segments: Segments) -> None:
        self.axis, self.segments = axis, segments

    def of(self, linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The linear's output, with all features of this rank's group."""
        tp = self.axis.size
        pieces = list(linear(x).split([c * width // tp for c, width in self.segments], -1))
        shared = [i for i, (count, _) in enumerate(self.segments) if count % tp]
        made = torch.cat([pieces[i] for i in shared], -1).transpose(1, 2)
        M = made.shape[1]
        whole = pairs.allgather_reducescatter(made, M * tp, self.axis).unflatten(1, (tp, M))
        parts = whole.split([pieces[i].shape[-1] for i in shared], 2)
        for i, part in zip(shared, parts, strict=True):
            count, width = self.segments[i]
            group = self.axis.rank * count // tp
            own = part.flatten(1, 2).narrow(1, group * width, width)
            pieces[i] = own.transpose(1, 2)
        return torch.cat(pieces, -1)


class NormOverGroups:
    """A gated norm, whose groups of features may be on several ranks; in place of its forward.

    Shapes:   x [B, S, n], gate [B, S, n] or None, weight [n] -> [B, S, n]
    Forward:  1 all-reduce of ``[B, S, groups]`` sums of squares, if the ranks are more than groups;
              with context parallel ranks another
    Backward: the same
    Saves:    what transformers' own saves
    """

    def __init__(self, module: nn.Module, form: GatedNormForm, state: ParallelState) -> None:
        self.module, self.form, self.state = module, form, state
        self.size = module.get_parameter("weight").numel() // form.groups

    @classmethod
    def install(cls, module: nn.Module, state: ParallelState) -> None:
        """Replace the forward of a norm whose form is known."""
        form = gated_norm_form(module)
        assert form is not None
        setattr(module, "forward", cls(module, form, state))  # noqa: B010 (a method to mypy)

    def __call__(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """The norm of this rank's features."""
        form, module = self.form, self.module
        if form.groups % place(self.state)[0] == 0:
            return type(module).forward(module, x, gate)
        early = form.casting == "input"
        y = x.float() if early else x
        if gate is not None and form.gated_first:
            y = y * F.silu(gate.float())
        y = y.float()
        y = y * torch.rsqrt(self._mean_square(y) + form.eps)
        weight: Any = module.weight
        if early:
            return weight * y.to(x.dtype)
        y = weight * y
        if gate is not None and not form.gated_first:
            y = y * F.silu(gate.float())
        return y.to(x.dtype)

    def _mean_square(self, y: Tensor) -> Tensor:
        """Of this rank's group, summed over the ranks that have features of it."""
        state, groups = self.state, self.form.groups
        ranks, rank = place(state)
        group = rank * groups // ranks
        squares = F.pad(y.pow(2).sum(-1, keepdim=True), (group, groups - 1 - group))
        axes = [state.axis] if state.cut is None else [state.axis, state.cut.axis]
        for axis in axes:
            # Each rank's output depends on the sum: its gradient is a sum too.
            squares = pairs.identity_allreduce(pairs.allreduce_identity(squares, axis), axis)
        return squares.narrow(-1, group, 1) / self.size
