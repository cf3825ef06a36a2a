"""Mixers over a sequence of which each context parallel rank has a part: all tokens of own heads.

As Ulysses does for attentions: the column linears compute on this rank's tokens, their outputs are
exchanged in one all-to-all to all tokens of some heads, transformers' forward runs its convolution
and its scan on these, and what the row linear is given goes back. It runs over all cp ranks in the
order of the sequence, whatever an attention does (Megatron-LM does so for Mamba).

Shape letters: B batch, S sequence, P tokens of this rank's part, H hidden, o features of a column
linear here, e = o / cp, f features of the row linear here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.parts import Parts
from hf_sp.errors import ShapeError
from hf_sp.plan.schema import Block

Sizes = tuple[int, ...]
"""Features of each of what is packed in a linear's output; each is split among the cp ranks."""


class OwnHeads:
    """Shows a mixer all tokens of this rank's heads.

    Its linears are found in its ``__dict__`` while it runs (attribute lookup asks that first), so
    that whatever wraps them, an adapter too, computes on this rank's tokens as it always does.
    """

    def __init__(self, module: nn.Module, block: Block, tp: int) -> None:
        self.module = module
        names = {leaf: leaf.path.rpartition(".")[2] for leaf in block.leaves}
        self.columns: dict[str, Sizes] = {}
        self.row = ""
        for leaf, name in names.items():
            if leaf.style == "row":
                self.row = name
            else:
                segments = leaf.segments or (1,)
                own, units = leaf.shape[0] // tp, sum(segments)
                self.columns[name] = tuple(own * segment // units for segment in segments)

    def show(self, x_BPH: Tensor, S: int, parts: Parts) -> Tensor:
        """A stand-in for the whole input: its shape and no memory, numbers that nobody may use.

        Shapes: x [B, P, H] -> [B, S, H]
        """
        B, _, H = x_BPH.shape
        stand_in = x_BPH.detach().new_full((1,), torch.nan).expand(B, S, H)
        children, shown = self.module._modules, self.module.__dict__
        columns = _Columns(self, stand_in, x_BPH, parts)
        for name in self.columns:
            shown[name] = _Shown(children[name], functools.partial(columns.output, name))
        shown[self.row] = _Shown(children[self.row], functools.partial(self.output, parts=parts))
        return stand_in

    def output(self, x_BSe: Tensor, parts: Parts) -> Tensor:
        """The row linear of this rank's tokens. Shapes: x [B, S, f / cp] -> [B, P, H] partial."""
        row: Any = self.module._modules[self.row]
        return row(to_tokens(x_BSe, parts))

    def hide(self) -> None:
        """Give the linears back."""
        for name in (*self.columns, self.row):
            self.module.__dict__.pop(name, None)


class _Shown:
    """Stands where a linear does."""

    def __init__(self, module: Any, function: Callable[[Tensor], Tensor]) -> None:
        self.module, self.function = module, function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["module"], name)


class _Columns:
    """Outputs of a mixer's column linears in one forward, which are exchanged together."""

    def __init__(self, heads: OwnHeads, stand_in: Tensor, x_BPH: Tensor, parts: Parts) -> None:
        self.heads, self.stand_in, self.x, self.parts = heads, stand_in, x_BPH, parts
        self.made: dict[str, Tensor] = {}

    def output(self, name: str, x: Tensor) -> Tensor:
        """Of one of them, given the stand-in: all tokens of this rank's heads ``[B, S, e]``."""
        heads = self.heads
        if x is not self.stand_in:
            raise ShapeError(
                "a mixer changes its input before its linears",
                where=f"{type(heads.module).__name__}.{name}",
                rule="with cp > 1 a linear is given this rank's tokens in its place",
                remedy="cp=1; tp and sp split such a model",
            )
        if not self.made:
            children: Any = heads.module._modules
            made = [children[one](self.x) for one in heads.columns]
            S, sizes = self.stand_in.shape[1], tuple(heads.columns.values())
            whole = _ToHeads.apply(S, self.parts, sizes, *made)
            self.made = dict(zip(heads.columns, whole, strict=True))
        return self.made[name]


def to_tokens(x_BSe: Tensor, parts: Parts) -> Tensor:
    """All features of this rank's tokens.

    Shapes:   x [B, S, e] -> [B, P, cp * e]
    Forward:  1 all-to-all of ``[cp, P, B, e]``, of which a rank keeps a cp-th
    Backward: 1 all-to-all of the same size
    Saves:    nothing
    """
    return _ToTokens.apply(x_BSe, parts)


class _ToHeads(Node):
    """All tokens of this rank's features of several linears.

    Shapes:   [B, P, o] each -> [B, S, o / cp] each, contiguous
    Forward:  1 all-to-all of ``[cp, P, B, sum(o) / cp]``, of which a rank keeps a cp-th
    Backward: 1 all-to-all of the same size
    Saves:    nothing
    """

    @staticmethod
    def forward(
        ctx: Any, S: int, parts: Parts, sizes: tuple[Sizes, ...], *made: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.parts, ctx.sizes = parts, sizes
        return tuple(_spread(made, sizes, S, parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, None, None, *_collect(grads, ctx.sizes, ctx.parts)


class _ToTokens(Node):
    @staticmethod
    def forward(ctx: Any, x_BSe: Tensor, parts: Parts) -> Tensor:
        ctx.parts, ctx.length = parts, x_BSe.shape[1]
        ctx.sizes = ((x_BSe.shape[-1] * parts.axis.size,),)
        return _collect([x_BSe], ctx.sizes, parts)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _spread(grads, ctx.sizes, ctx.length, ctx.parts)[0], None


def _spread(
    made: Sequence[Tensor], sizes: Sequence[Sizes], S: int, parts: Parts
) -> list[Tensor]:
    """``[B, P, o]`` each -> ``[B, S, o / cp]`` each, in one all-to-all."""
    cp = parts.axis.size
    pieces = [
        piece.unflatten(-1, (cp, -1)).permute(2, 1, 0, 3)
        for x, own in zip(made, sizes, strict=True)
        for piece in x.split(own, -1)
    ]
    sent = torch.cat(pieces, -1).flatten(0, 1)
    P = made[0].shape[1]
    found = comm.all_to_all(sent, [P] * cp, [P] * cp, parts.axis)[:S]
    widths = [sum(own) // cp for own in sizes]
    return [x.transpose(0, 1).contiguous() for x in found.split(widths, -1)]


def _collect(made: Sequence[Tensor], sizes: Sequence[Sizes], parts: Parts) -> list[Tensor]:
    """``[B, S, o / cp]`` each -> ``[B, P, o]`` each, in one all-to-all."""
    cp = parts.axis.size
    B, S, _ = made[0].shape
    P = parts.length(S)
    sent = made[0].new_empty(cp * P, B, sum(x.shape[-1] for x in made))
    torch.cat([x.transpose(0, 1) for x in made], -1, out=sent[:S])
    sent[S:].zero_()
    found = comm.all_to_all(sent, [P] * cp, [P] * cp, parts.axis).unflatten(0, (cp, P))
    widths = [part // cp for own in sizes for part in own]
    pieces = iter(x.permute(2, 1, 0, 3).flatten(2) for x in found.split(widths, -1))
    return [torch.cat([next(pieces) for _ in own], -1) for own in sizes]
