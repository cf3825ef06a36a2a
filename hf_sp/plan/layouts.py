"""Where a step's hidden states are whole and where sharded, and the collectives between, as data.

``hf-sp explain`` prints it, ``hf_sp.verify`` holds a step to it, and so do the tests. What makes it
of a plan is in ``step``.

Shape letters: B batch, S sequence, s = ceil(S / tp), H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Layout = Literal["SCATTERED", "FULL"]
"""Of hidden states on a rank: its shard of the sequence ``[B, s, H]``, or all of it ``[B, S, H]``.
"""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A step's sizes.

    Args:
        batch: rows.
        length: tokens of a row.
        itemsize: bytes of a number of the activations.
        lora: rank of adapters on all linears, whose base is frozen; 0: none.
        loss_chunk: as in ``parallelize``.
        router_logits: whether the model is asked for them.
        fused: whether norms of a known form run hf_sp's functions (``kernels`` or ``recompute``).
    """

    batch: int
    length: int
    itemsize: int = 2
    lora: int = 0
    loss_chunk: int = 4096
    router_logits: bool = False
    fused: bool = True


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective; ``shape`` is of the whole buffer, as ``hf_sp.estimate`` counts it.

    ``varies``: a router decides how many rows travel; the shape is an even router's.
    """

    phase: Literal["forward", "backward"]
    kind: Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
    what: str
    shape: tuple[int, ...]
    itemsize: int
    varies: bool = False

    @property
    def bytes(self) -> int:
        """Its payload."""
        return int(torch.Size(self.shape).numel()) * self.itemsize


@dataclass(frozen=True, slots=True)
class Stage:
    """What runs between two layouts: a block, or an end of the stack."""

    path: str
    what: str
    takes: Layout
    inside: Layout
    gives: Layout
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """A decoder layer. Norms and the residual stream are in the layout of its input."""

    path: str
    input: Layout
    attention: Layout
    mlp: Layout
    residual: Layout
    output: Layout
    stages: tuple[Stage, ...]


@dataclass(frozen=True, slots=True)
class StepLayout:
    """A training step with the chunked loss, without checkpointing."""

    begin: Stage
    layers: tuple[LayerLayout, ...]
    end: Stage

    def collectives(self) -> Iterator[Collective]:
        """All of a step."""
        yield from self.begin.collectives
        for layer in self.layers:
            for stage in layer.stages:
                yield from stage.collectives
        yield from self.end.collectives
