"""What a mixer does to its input, done to this rank's tokens of it before they are gathered.

Then the gathered tensor is the one that its linears read, and the shard is made again as others.

Shape letters: B batch, S sequence, s this rank's tokens of it, H hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.comm.parts import Parts
from hf_sp.model.recompute import Recompute, attach_recompute, recompute_of

Where = tuple[Parts | None, Axis | None]
"""How the sequence is cut: over cp ranks, and over tp ranks; None where it is not."""


def masked(x: Tensor, mask: Any, where: Where) -> Tensor:
    """Zeros where a padding mask ``[B, S]`` has them; as it is with another mask or none."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return x
    y = _Masked.apply(x, mask, *where)
    if (known := recompute_of(x)) is not None:
        again = functools.partial(_masked_again, known.function, where)
        attach_recompute(y, Recompute(again, (*known.inputs, mask)))
    return y


def multiplied(x: Tensor, factor: float) -> Tensor:
    """Times a number."""
    y = x * factor
    if (known := recompute_of(x)) is not None:
        again = functools.partial(_times, known.function, factor)
        attach_recompute(y, Recompute(again, known.inputs))
    return y


class AppliedMask:
    """A padding mask that has been multiplied into a mixer's input.

    Its product with that is that; with anything else of the whole sequence (Mamba-2 masks what
    comes out of its convolution too) it is the product with the mask.
    """

    def __init__(self, mask: Tensor, x: Tensor) -> None:
        self.mask, self.x = mask, x

    def __getitem__(self, index: Any) -> AppliedMask:
        """As of the mask."""
        return AppliedMask(self.mask[index], self.x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["mask"], name)

    def __rmul__(self, x: Tensor) -> Tensor:
        return x if x is self.x else x * self.mask


class AppliedFactor:
    """A number that has been multiplied into a mixer's input, whose product with that is that."""

    def __rmul__(self, x: Tensor) -> Tensor:
        return x


class _Masked(Node):
    """Hidden states of this rank's tokens, with zeros where a mask of the whole sequence has them.

    Shapes:   x [B, s, H], mask [B, S] -> [B, s, H]
    Forward, backward: no collective
    Saves:    the mask, as it is: all layers have the same
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, parts: Parts | None, tp: Axis | None) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.where = parts, tp
        return _masked(x, mask, parts, tp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return _masked(grads[0], mask, *ctx.where), None, None, None


def _masked(x: Tensor, mask: Tensor, parts: Parts | None, tp: Axis | None) -> Tensor:
    own = mask if parts is None else parts.take(mask, 1)
    own = own if tp is None else comm.own_shard(own, tp)
    return (x * own[..., None]).to(x.dtype)


def _times(function: Callable[..., Tensor], factor: float, *inputs: Tensor) -> Tensor:
    return function(*inputs) * factor


def _masked_again(function: Callable[..., Tensor], where: Any, *inputs: Tensor) -> Tensor:
    *given, mask = inputs
    return _masked(function(*given), mask, *where)
