"""The parallel plan of one model, as data.

Owns the dataclasses and their printed form. Must not know torch.distributed, modules in flight or
how a plan is carried out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Style = Literal["column", "row", "column_replicated", "replicated"]
"""How a linear inside a TP block is split.

``column``: weight ``[out, in]`` split on dim 0. ``row``: split on dim 1. ``column_replicated``: a
k or v projection with fewer heads than ranks; the weight is stored whole on every rank, each rank
computes with the rows of the one head that its query heads attend to, and the gradients are summed.
``replicated``: whole on every rank, its gradient summed (the gate of a shared expert).
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
class Experts:
    """The experts of a mixture-of-experts block.

    Args:
        path: module that owns ``gate_up_proj [E, 2f, H]`` and ``down_proj [E, H, f]``.
        router: module with one replicated weight ``[E, H]``; its gradient is partial.
        shared: module of the shared expert, "" for a block without one; its linears are leaves of
            the block.
        split: ``features``: every rank has f / tp features of every expert, on all tokens.
            ``experts``: every rank has E / ep whole experts, and tokens travel to them.
        count: E.
        intermediate: f.
        hidden: H.
    """

    path: str
    router: str
    shared: str
    split: Literal["features", "experts"]
    count: int
    intermediate: int
    hidden: int


@dataclass(frozen=True, slots=True)
class Block:
    """A TP block: the decoder layer's child between one all-gather and one reduce-scatter.

    With experts that are split whole (``experts.split``), the block stays on the sequence shard,
    and its shared expert is the TP block.

    Args:
        path: module path.
        leaves: its column and row linears, in the model's order.
        partial: modules inside it with replicated weights that each rank uses on its own heads.
        attention: whether the block attends over the sequence and so needs its true length.
        experts: the experts of a sparse block.
    """

    path: str
    leaves: tuple[Leaf, ...]
    partial: tuple[str, ...] = ()
    attention: bool = False
    experts: Experts | None = None


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
        ep: expert parallel degree; 1, tp, or tp times the data parallel ranks it spans.
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
    ep: int = 1

    def __str__(self) -> str:
        """The plan of one layer and of what surrounds them, one line a module."""
        degrees = f"tp={self.tp}  sp={self.sp}" + (f"  ep={self.ep}" if self.ep > 1 else "")
        lines = [f"{self.family}  {degrees}  layers={len(self.layers)}"]

        def row(path: str, what: str) -> None:
            lines.append(f"  {path:<39} {what}")

        row(self.embedding, "vocab-parallel embedding: all-reduce")
        if self.sp:
            row(self.layers[0], "entry of the stack: take the sequence shard")
        partial = "gradient summed over tp" if self.sp else "gradient whole on every rank"
        kinds = self._layers_of_each_kind()
        for same in kinds:
            if len(kinds) > 1:
                lines.append(f"  layers {', '.join(layer.rpartition('.')[2] for layer in same)}:")
            for block in (b for b in self.blocks if b.path.startswith(same[0] + ".")):
                for path, what in _describe_block(block, self.tp, self.sp, self.ep):
                    row(path, what)
            for path in (n for n in self.shard_norms if n.startswith(same[0] + ".")):
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

    def _layers_of_each_kind(self) -> list[list[str]]:
        """Layers whose plans differ in their paths only, together; one of each kind is printed."""
        kinds: dict[object, list[str]] = {}
        for layer in self.layers:
            blocks = [b for b in self.blocks if b.path.startswith(layer + ".")]
            lines = [
                row for block in blocks for row in _describe_block(block, self.tp, self.sp, self.ep)
            ]
            key = tuple((path.replace(layer + ".", ""), what) for path, what in lines)
            kinds.setdefault(key, []).append(layer)
        return list(kinds.values())


def _describe_block(block: Block, tp: int, sp: bool, ep: int = 1) -> Iterator[tuple[str, str]]:
    """Pairs of a module path and what becomes of it."""
    entry, leave = ("all-gather", "reduce-scatter") if sp else ("-", "all-reduce")
    experts = block.experts
    travel = experts is not None and experts.split == "experts"
    if travel:
        yield block.path, "MoE block: on the sequence shard, no collective of its own"
    else:
        kind = "TP block" if experts is None else "MoE block"
        yield block.path, f"{kind}: {entry} on entry, {leave} on exit"
    if experts is not None:
        count, f, h = experts.count, experts.intermediate, experts.hidden
        part = (count // ep, f) if travel else (count, f // tp)
        sizes = f"[{count}, 2*{f}, {h}] -> [{part[0]}, 2*{part[1]}, {h}]"
        yield "  " + experts.router, "router: replicated, gradient summed over tp"
        how = "experts: all-to-all there and back" if travel else "experts: features split"
        how += " over tp and dp_shard" if ep > tp else ""
        yield "  " + experts.path, f"{how}, {sizes}"
        if experts.shared and travel:
            yield "  " + experts.shared, "TP block: all-gather on entry, reduce-scatter on exit"
    for leaf in block.leaves:
        yield "  " + leaf.path, _describe_leaf(leaf, tp)
    for path in block.partial:
        yield "  " + path, "replicated, gradient summed over tp"


def _describe_leaf(leaf: Leaf, tp: int) -> str:
    heads = f"  {leaf.heads} heads" if leaf.heads else ""
    out, into = leaf.shape
    if leaf.style == "replicated":
        return f"replicated, gradient summed over tp  [{out}, {into}]"
    local = {
        "column": (out // tp, into),
        "row": (out, into // tp),
        "column_replicated": (out // max(leaf.heads, 1), into),
    }[leaf.style]
    return f"{leaf.style:<8} [{out}, {into}] -> [{local[0]}, {local[1]}]{heads}"
