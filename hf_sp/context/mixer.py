"""Mixers over a sequence of which each context parallel rank has a part: all tokens of own heads.

As Ulysses does for attentions: the column linears compute on this rank's tokens, their outputs are
exchanged in one all-to-all to all tokens of some heads, transformers' forward runs its convolution
and its scan on these, and what the row linear is given goes back. It runs over all cp ranks in the
order of the sequence, whatever an attention does (Megatron-LM does so for Mamba).

Shape letters: B batch, S sequence, P tokens of this rank's part, H hidden, o features of a column
linear here, e those of a cp rank (o / cp, but for what several share).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.parts import Parts
from hf_sp.errors import ShapeError
from hf_sp.model.mixer import Shown
from hf_sp.plan.schema import Block, Segments


class OwnHeads:
    """Shows a mixer all tokens of this rank's heads."""

    def __init__(self, module: nn.Module, block: Block, tp: int) -> None:
        assert block.mixer is not None
        self.module = module
        self.columns = {
            name: tuple((max(1, count // tp), width) for count, width in segments)
            for name, segments in block.mixer.columns
        }
        row = next(leaf.path for leaf in block.leaves if leaf.style == "row")
        self.row = row.rpartition(".")[2]

    def show(self, x_BPH: Tensor, S: int, parts: Parts) -> Tensor:
        """A stand-in for the whole input: its shape and no memory, numbers that nobody may use.

        Shapes: x [B, P, H] -> [B, S, H]
        """
        B, _, H = x_BPH.shape
        stand_in = x_BPH.detach().new_full((1,), torch.nan).expand(B, S, H)
        module, columns = self.module, _Columns(self, stand_in, x_BPH, parts)
        # What is shown already computes on this rank's tokens.
        linears: dict[str, Any] = {name: getattr(module, name) for name in self.columns}
        columns.linears = linears
        for name, linear in linears.items():
            module.__dict__[name] = Shown(linear, functools.partial(columns.output, name))
        row = Shown(module._modules[self.row], lambda row, x_BSe: row(to_tokens(x_BSe, parts)))
        module.__dict__[self.row] = row
        return stand_in


class _Columns:
    """Outputs of a mixer's column linears in one forward, which are exchanged together."""

    linears: Mapping[str, Any]

    def __init__(self, heads: OwnHeads, stand_in: Tensor, x_BPH: Tensor, parts: Parts) -> None:
        self.heads, self.stand_in, self.x, self.parts = heads, stand_in, x_BPH, parts
        self.made: dict[str, Tensor] = {}

    def output(self, name: str, linear: Any, x: Tensor) -> Tensor:
        """Of one of them, given the stand-in: all tokens of this rank's heads ``[B, S, e]``."""
        if x is not self.stand_in:
            raise ShapeError(
                "a mixer changes its input before its linears",
                where=f"{type(self.heads.module).__name__}.{name}",
                rule="with cp > 1 a linear is given this rank's tokens in its place",
                remedy="cp=1; tp and sp split such a model",
            )
        if not self.made:
            made = [one(self.x) for one in self.linears.values()]
            sizes = tuple(self.heads.columns.values())
            whole = _ToHeads.apply(self.stand_in.shape[1], self.parts, sizes, *made)
            self.made = dict(zip(self.linears, whole, strict=True))
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

    Shapes:   [B, P, o] each -> [B, S, e] each, contiguous
    Forward:  1 all-to-all of ``[cp, P, B, sum(e)]``, of which a rank keeps a cp-th
    Backward: 1 all-to-all of the same size; what went to several ranks is summed
    Saves:    nothing
    """

    @staticmethod
    def forward(
        ctx: Any, S: int, parts: Parts, sizes: tuple[Segments, ...], *made: Tensor
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
        ctx.sizes = (((parts.axis.size, x_BSe.shape[-1]),),)
        return _collect([x_BSe], ctx.sizes, parts)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _spread(grads, ctx.sizes, ctx.length, ctx.parts)[0], None


def _by_rank(x: Tensor, heads: int, cp: int) -> Tensor:
    """``[.., heads * D]`` -> ``[.., cp, e]``: of fewer heads than ranks each goes to several."""
    x = x.unflatten(-1, (min(heads, cp), -1))
    return x if heads >= cp else x.repeat_interleave(cp // heads, -2)


def _of_ranks(x: Tensor, heads: int, cp: int) -> Tensor:
    """The other way, the gradient of it: sums where there were several."""
    x = x if heads >= cp else x.unflatten(-2, (heads, cp // heads)).sum(-2)
    return x.flatten(-2)


def _spread(
    made: Sequence[Tensor], sizes: Sequence[Segments], S: int, parts: Parts
) -> list[Tensor]:
    """``[B, P, o]`` each -> ``[B, S, e]`` each, in one all-to-all."""
    cp, P = parts.axis.size, made[0].shape[1]
    split = [
        [
            _by_rank(piece, heads, cp)
            for piece, (heads, _) in zip(x.split([n * w for n, w in own], -1), own, strict=True)
        ]
        for x, own in zip(made, sizes, strict=True)
    ]
    sent = torch.cat([piece.permute(2, 1, 0, 3) for own in split for piece in own], -1)
    found = comm.all_to_all(sent.flatten(0, 1), [P] * cp, [P] * cp, parts.axis)
    widths = [sum(piece.shape[-1] for piece in own) for own in split]
    whole = parts.in_order(found, S).split(widths, -1)
    return [x.transpose(0, 1).contiguous() for x in whole]


def _collect(made: Sequence[Tensor], sizes: Sequence[Segments], parts: Parts) -> list[Tensor]:
    """``[B, S, e]`` each -> ``[B, P, o]`` each, in one all-to-all."""
    cp, P = parts.axis.size, parts.length(made[0].shape[1])
    sent = parts.by_rank(torch.cat([x.transpose(0, 1) for x in made], -1))
    found = comm.all_to_all(sent, [P] * cp, [P] * cp, parts.axis).unflatten(0, (cp, P))
    widths = [max(1, heads // cp) * width for own in sizes for heads, width in own]
    pieces = iter(x.permute(2, 1, 0, 3) for x in found.split(widths, -1))
    return [torch.cat([_of_ranks(next(pieces), n, cp) for n, _ in own], -1) for own in sizes]
