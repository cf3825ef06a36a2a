"""The parallel plan of one model, as data.

Owns the dataclasses and their printed form. Must not know torch.distributed, modules in flight or
how a plan is carried out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Style = Literal["column", "row", "column_replicated"]
"""How a linear inside a TP block is split.

``column``: weight ``[out, in]`` split on dim 0. ``row``: split on dim 1. ``column_replicated``: a
k or v projection with fewer heads than ranks; the weight is stored whole on every rank, each rank
computes with the rows of the one head that its query heads attend to, and the gradients are summed.
"""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A linear inside a TP block.

    Args:
        path: module path, as in ``model.get_submodule``.
        style: how it is split.
        shape: ``(out_features, in_features)`` of the whole weight.
        heads: number of attention heads along the split dim, 0 outside attention.
    """

    path: str
    style: Style
    shape: tuple[int, int]
    heads: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """A TP block: the decoder layer's child between one all-gather and one reduce-scatter.

    Args:
        path: module path.
        leaves: its column and row linears, in the model's order.
        partial: modules inside it with replicated weights that each rank uses on its own heads.
        attention: whether the block attends over the sequence and so needs its true length.
    """

    path: str
    leaves: tuple[Leaf, ...]
    partial: tuple[str, ...] = ()
    attention: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``parallelize`` will do to a model.

    Args:
        family: ``config.model_type``.
        tp: tensor parallel degree.
        sp: whether hidden states between blocks are sequence shards.
        decoder: path of the module that owns embedding, layers and final norm ("" = the model).
        layers: paths of the decoder layers.
        blocks: the TP blocks.
        embedding: path of the vocab-parallel embedding.
        norm: path of the final norm.
        head: path of the vocab-parallel LM head, None for a model without one.
        shard_norms: modules with replicated weights used on the hidden stream (norms); with
            ``sp`` each rank sees its sequence shard only, so that their gradients are partial.
        replicated: modules outside the decoder, computed alike on all ranks.
        tied: whether head and embedding share one weight.
    """

    family: str
    tp: int
    sp: bool
    decoder: str
    layers: tuple[str, ...]
    blocks: tuple[Block, ...]
    embedding: str
    norm: str
    head: str | None
    shard_norms: tuple[str, ...]
    replicated: tuple[str, ...] = ()
    tied: bool = False

    def __str__(self) -> str:
        """The plan of one layer and of what surrounds them, one line a module."""
        lines = [f"{self.family}  tp={self.tp}  sp={self.sp}  layers={len(self.layers)}"]

        def row(path: str, what: str) -> None:
            lines.append(f"  {path:<40}{what}")

        row(self.embedding, "vocab-parallel embedding: all-reduce")
        if self.sp:
            row(self.layers[0], "entry of the stack: take the sequence shard")
        first = self.layers[0]
        norms = [n for n in self.shard_norms if n.startswith(first + ".")]
        partial = "gradient summed over tp" if self.sp else "gradient whole on every rank"
        for block in (b for b in self.blocks if b.path.startswith(first + ".")):
            entry, leave = ("all-gather", "reduce-scatter") if self.sp else ("-", "all-reduce")
            row(block.path, f"TP block: {entry} on entry, {leave} on exit")
            for leaf in block.leaves:
                heads = f"  {leaf.heads} heads" if leaf.heads else ""
                out, into = leaf.shape
                local = {
                    "column": (out // self.tp, into),
                    "row": (out, into // self.tp),
                    "column_replicated": (out // max(leaf.heads, 1), into),
                }[leaf.style]
                sizes = f"[{out}, {into}] -> [{local[0]}, {local[1]}]"
                row("  " + leaf.path, f"{leaf.style:<8} {sizes}{heads}")
            for path in block.partial:
                row("  " + path, "replicated, gradient summed over tp")
        for path in norms:
            row(path, f"replicated, {partial}")
        row(self.norm, f"replicated, {partial}")
        if self.sp:
            row(self.norm, "exit of the stack: all-gather")
        if self.head is not None:
            tied = ", tied to the embedding" if self.tied else ""
            row(self.head, f"vocab-parallel head, chunked loss{tied}")
        for path in self.replicated:
            row(path, "replicated, computed alike on all ranks")
        return "\n".join(lines)
