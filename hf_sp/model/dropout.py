"""Dropout whose masks every rank can make again for every part of a gathered tensor.

A mask is made from a seed and the number of its part: the owner of a sequence shard drops in
backward what all ranks have dropped of its rows in forward. Masks are never stored.

Shape letters: B batch, S sequence, s = S / tp, H features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sp.comm.collectives import padded
from hf_sp.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Dropout:
    """One draw.

    Args:
        p: probability of dropping, below one.
        seed: what the masks are made from, int64 on the CPU. Drawn from torch's default generator,
            which checkpointing restores before it recomputes. A tensor, so that torch.compile draws
            one for each call.
    """

    p: float
    seed: Tensor

    @classmethod
    def draw(cls, p: float) -> Dropout | None:
        """A new draw, the same on all ranks; None where nothing is dropped."""
        return cls(p, torch.randint(2**62, ())) if p > 0 else None

    @property
    def scale(self) -> float:
        """What the kept values are multiplied with."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    def part(self, x: Tensor, index: int) -> Tensor:
        """Zeros among part ``index`` of what the ranks see as one tensor. Not scaled."""
        return x * torch.ops.hf_sp.keep_mask(x, self.seed, self.p, index, 1)

    def parts(self, x_SBH: Tensor, count: int) -> Tensor:
        """The same of a gathered tensor, as each of the ``count`` owners of its rows would."""
        return x_SBH * torch.ops.hf_sp.keep_mask(x_SBH, self.seed, self.p, 0, count)


@torch.library.custom_op("hf_sp::keep_mask", mutates_args=())
def keep_mask(x: Tensor, seed: Tensor, p: float, first: int, count: int) -> Tensor:
    """Which elements of ``count`` parts along dim 0 are kept, from part number ``first`` on.

    An operator, so that a compiled graph makes new masks from each call's seed.

    Raises:
        ConfigError: a CUDA graph is being captured, whose replays would repeat one mask.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "LoRA dropout cannot be captured in a CUDA graph",
            rule="its masks are made from a number on the host; replays would repeat one mask",
            remedy="lora_dropout=0, or no CUDA graphs",
        )
    height = padded(x.shape[0], count) // count
    # The owner's shard is padded: its mask is of the padded shape.
    keep = torch.empty(height * count, *x.shape[1:], dtype=torch.bool, device=x.device)
    for index, part in enumerate(keep.chunk(count) if count > 1 else [keep]):
        generator = torch.Generator(x.device).manual_seed(int(seed) + first + index)
        part.bernoulli_(1 - p, generator=generator)
    return keep[: x.shape[0]]


@keep_mask.register_fake
def _(x: Tensor, seed: Tensor, p: float, first: int, count: int) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bool, device=x.device)
