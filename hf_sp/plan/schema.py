"""The parallel plan of one model, as data: dataclasses of module paths, and their printed form.

Must not know modules or how a plan is carried out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["column", "column_by_head", "packed", "row", "partial", "replicated", "alike"]
"""What a plan says of a module.

``column``, ``row``: a linear. ``column_by_head``: a column linear with several features' kinds a
head. ``packed``: several column linears in one, gate and up, or q, k and v. ``partial``: replicated
weights on local heads. ``replicated``: a linear whose output is the same on every rank, and used on
local heads. ``alike``: the same on every rank, and without a gradient.
"""

Style = Literal["column", "row", "column_replicated", "replicated", "packed"]
"""How a linear inside a TP block is split.

``column``: weight ``[out, in]`` split on dim 0. ``row``: split on dim 1. ``column_replicated``: a
k or v projection with fewer heads than ranks; the weight is stored whole on every rank, each rank
computes with the rows of the one head that its query heads attend to, and the gradients are summed.
``replicated``: whole on every rank, its gradient summed (the gate of a shared expert, the low-rank
projections of latent attention). ``packed``: each of several linears in one (gate and up; q, k and
v) is split on dim 0.
"""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A linear inside a TP block."""

    path: str
    style: Style
    shape: tuple[int, int]  # (out_features, in_features) of the whole weight
    heads: int = 0  # attention heads along the split dim, 0 outside attention
    # Of several linears in one: how many features, or heads, each of them has.
    segments: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        """What is divided among the ranks: heads, or features of the split dim."""
        if self.style == "packed" and not self.heads:
            return self.shape[0] // len(self.segments)
        return self.heads or self.shape[1 if self.style == "row" else 0]

    def rows(self, tp: int, rank: int) -> tuple[tuple[int, int], ...] | None:
        """Of a weight that is stored whole: first row and rows of each stretch that a rank uses."""
        if self.style == "replicated":
            return ((0, self.shape[0]),)
        if self.style != "column_replicated":
            return None
        counts = self.segments or (self.heads,)
        width = self.shape[0] // sum(counts)
        return _stretches([(count, width) for count in counts], tp, rank)

    def describe(self, tp: int) -> str:
        """The style, the whole and the local shape."""
        out, into = self.shape
        if self.style == "replicated":
            return f"replicated, gradient summed over tp  [{out}, {into}]"
        rows = self.rows(tp, 0)
        own = out // tp if rows is None else sum(n for _, n in rows)
        local = (out, into // tp) if self.style == "row" else (own, into)
        heads = f"  {self.heads} heads" if self.heads else ""
        return f"{self.style:<8} [{out}, {into}] -> [{local[0]}, {local[1]}]{heads}"


Segments = Sequence[tuple[int, int]]
"""Of what is packed in one dim: how many heads, or groups of heads, and features of each."""


def _stretches(segments: Segments, ranks: int, rank: int) -> tuple[tuple[int, int], ...]:
    """First place and length of a rank's heads of each segment."""
    start, found = 0, []
    for count, width in segments:
        # Ranks r * ranks / count to (r + 1) * ranks / count share head r.
        first, own = rank * count // ranks, max(1, count // ranks)
        found.append((start + first * width, own * width))
        start += count * width
    return tuple(found)


def own_size(segments: Segments, ranks: int) -> int:
    """How much of it a rank has."""
    return sum(length for _, length in _stretches(segments, ranks, 0))


@dataclass(frozen=True, slots=True)
class OwnRows:
    """A small tensor of a mixer, stored whole, of which a rank uses what is of its heads."""

    module: str
    name: str
    segments: Segments
    dim: int = 0

    @property
    def size(self) -> int:
        """All rows."""
        return own_size(self.segments, 1)

    def rows(self, ranks: int, rank: int) -> tuple[tuple[int, int], ...]:
        """First row and rows of each stretch that a rank uses."""
        return _stretches(self.segments, ranks, rank)


@dataclass(frozen=True, slots=True)
class Mixer:
    """What a linear attention or a state-space model has besides linears and norms."""

    heads: int  # what tp divides: heads, or groups of heads that share keys
    shared: int  # groups of heads that share a state's inputs and outputs, 0 without
    counts: tuple[tuple[str, str, Segments], ...]  # module below it, attribute: what that counts
    own: tuple[OwnRows, ...]
    columns: tuple[tuple[str, Segments], ...]  # column linears: what their features are
    norms: tuple[tuple[str, int], ...] = ()  # gated norms over features of heads, their groups
    factor: str = ""  # attribute: a number that its input is multiplied with


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a mixture-of-experts block."""

    path: str  # owns gate_up_proj [E, 2f, H] and down_proj [E, H, f]
    # Owns one replicated weight [E, H], and may a bias; their gradients are partial. "" where the
    # experts are a child of the layer, which hands them routed tokens.
    router: str
    chooser: str  # whose forward routes: the router, or what holds it
    shared: str  # the shared expert, whose linears are leaves of the block; "" without one
    # features: every rank has f / tp features of every expert, on all tokens.
    # experts: every rank has E / ep whole experts, and tokens travel to them.
    split: Literal["features", "experts"]
    count: int  # E
    intermediate: int  # f
    hidden: int  # H
    transposed: bool = False  # gate_up_proj is [E, H, 2f] and down_proj [E, f, H]
    interleaved: bool = False  # gate and up alternate, else they are halves
    bias: bool = False  # owns gate_up_proj_bias [E, 2f] and down_proj_bias [E, H] too

    def split_dims(self) -> dict[str, tuple[int, bool]]:
        """Parameter -> the dim that is split, and whether it holds two halves, split each.

        The others are whole on every rank.
        """
        if self.split == "experts":
            names = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
            return dict.fromkeys(names, (0, False))
        halves = not self.interleaved
        dims = {
            "gate_up_proj": (2 if self.transposed else 1, halves),
            "gate_up_proj_bias": (1, halves),
        }
        return {**dims, "down_proj": (1 if self.transposed else 2, False)}


@dataclass(frozen=True, slots=True)
class Block:
    """A TP block: the decoder layer's child between one all-gather and one reduce-scatter.

    With experts that are split whole (``experts.split``), the block stays on the sequence shard,
    and its shared expert is the TP block.
    """

    path: str
    leaves: tuple[Leaf, ...]  # in the model's order
    partial: tuple[str, ...] = ()  # modules with replicated weights, used on the rank's own heads
    over_heads: tuple[
        str, ...
    ] = ()  # norms over the features of all heads; each rank has its own's
    # Modules with weights that compute the same on every rank, and have no gradient: what chooses
    # keys for sparse attention, corrections of a router.
    alike: tuple[str, ...] = ()
    of_heads: tuple[str, ...] = ()  # parameters with a number for each query head
    attention: bool = False  # attends over the sequence and so needs its true length
    experts: Experts | None = None
    mixer: Mixer | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``parallelize`` will do to a model."""

    family: str  # config.model_type
    tp: int
    sp: bool  # hidden states between blocks are sequence shards
    decoder: str  # owns embedding, layers and final norm; "" is the model
    layers: tuple[str, ...]
    blocks: tuple[Block, ...]
    embedding: str
    norm: str  # the final one
    head: str | None
    # Norms on the hidden stream: with sp each rank sees its shard only, and gradients are partial.
    shard_norms: tuple[str, ...]
    replicated: tuple[str, ...] = ()  # outside the decoder, computed alike on all ranks
    tied: bool = False  # head and embedding share one weight
    ep: int = 1  # 1, tp, or tp times the data parallel ranks it spans
    embeddings: tuple[str, ...] = ()  # besides the input embedding: vocab-parallel too
    dropout: bool = False  # the layers drop hidden states
    per_token: tuple[str, ...] = ()  # arguments of a layer that have a row for each token
    cp: int = 1
    ring: int = 1  # places of a ring that the cp ranks are, each of cp / ring

    def __str__(self) -> str:
        """The plan of one layer of each kind and of what surrounds them, one line a module."""
        kinds: dict[tuple[tuple[str, str], ...], list[str]] = {}
        for layer in self.layers:
            same = tuple((path.replace(f"{layer}.", ""), what) for path, what in self._layer(layer))
            kinds.setdefault(same, []).append(layer)
        rows = [(self.embedding, "vocab-parallel embedding: all-reduce")]
        rows += [(path, "vocab-parallel embedding: all-reduce") for path in self.embeddings]
        if self.sp or self.cp > 1:
            rows.append((self.layers[0], "entry of the stack: take the sequence shard"))
            rows += [
                (f"  {name}", "as each layer's argument: own tokens") for name in self.per_token
            ]
        for layers in kinds.values():
            if len(kinds) > 1:
                numbers = ", ".join(layer.rpartition(".")[2] for layer in layers)
                rows.append((f"layers {numbers}:", ""))
            rows += self._layer(layers[0])
        rows.append((self.norm, self._norm()))
        if self.sp or self.cp > 1:
            rows.append((self.norm, "exit of the stack: all-gather"))
        if self.head is not None:
            tied = ", tied to the embedding" if self.tied else ""
            rows.append((self.head, f"vocab-parallel head, chunked loss{tied}"))
        rows += [(path, "replicated, computed alike on all ranks") for path in self.replicated]
        degrees = f"tp={self.tp}  sp={self.sp}" + (f"  ep={self.ep}" if self.ep > 1 else "")
        degrees += f"  cp={self.cp} ({self.exchange()})" if self.cp > 1 else ""
        lines = [f"{self.family}  {degrees}  layers={len(self.layers)}"]
        lines += [f"  {path:<39} {what}".rstrip() for path, what in rows]
        return "\n".join(lines)

    def exchange(self) -> str:
        """How the context parallel ranks attend."""
        ulysses = self.cp // self.ring
        ways = [f"ulysses {ulysses}"] if ulysses > 1 else []
        return " x ".join([*ways, f"ring {self.ring}"] if self.ring > 1 else ways)

    def _norm(self) -> str:
        return f"replicated, gradient {'summed over tp' if self.sp else 'whole on every rank'}"

    def _layer(self, layer: str) -> Iterator[tuple[str, str]]:
        """Pairs of a module path and what becomes of it."""
        for block in self.blocks:
            if block.path.startswith(f"{layer}."):
                yield from self._block(block)
        for path in self.shard_norms:
            if path.startswith(f"{layer}."):
                yield path, self._norm()

    def _block(self, block: Block) -> Iterator[tuple[str, str]]:
        ends = "all-gather on entry, reduce-scatter on exit"
        ends = ends if self.sp else "- on entry, all-reduce on exit"
        experts = block.experts
        if experts is None:
            yield block.path, f"TP block: {ends}"
        else:
            travel = experts.split == "experts"
            alone = "on the sequence shard, no collective of its own"
            yield block.path, f"MoE block: {alone if travel else ends}"
            if experts.router:
                yield f"  {experts.router}", "router: replicated, gradient summed over tp"
            count, f, h = experts.count, experts.intermediate, experts.hidden
            e, part = (count // self.ep, f) if travel else (count, f // self.tp)
            how = "all-to-all there and back" if travel else "features split"
            how += " over tp and dp_shard" if self.ep > self.tp else ""
            sizes = f"[{count}, 2*{f}, {h}] -> [{e}, 2*{part}, {h}]"
            yield f"  {experts.path}", f"experts: {how}, {sizes}"
            if experts.shared and travel:
                yield f"  {experts.shared}", f"TP block: {ends}"
        for leaf in block.leaves:
            yield f"  {leaf.path}", leaf.describe(self.tp)
        for own in block.mixer.own if block.mixer else ():
            stretches = own.rows(self.tp * self.cp, 0)
            whole = f"whole, {sum(n for _, n in stretches)} of {own.size} rows used"
            yield f"  {own.module}.{own.name}", f"{whole}, gradient summed over tp"
        if block.attention and self.cp > 1:
            ways = ["all-to-all of q, k, v to heads, of its output back"]
            ways = ways if self.cp > self.ring else []
            ways += [f"k, v around a ring of {self.ring}"] if self.ring > 1 else []
            what = f"attention: {'; '.join(ways)}"
            if block.mixer:
                what = "mixer: all-to-all of its projections to heads, of its output back"
            yield f"  {block.path}", what
        for path in block.partial:
            yield f"  {path}", "replicated, gradient summed over tp"
        for path in block.alike:
            yield f"  {path}", "replicated, without a gradient"
        for path in block.of_heads:
            yield f"  {path}", "a number for each head: own heads'"
        for path in block.over_heads:
            yield f"  {path}", "norm over all heads: weight split, 1 all-reduce of sums of squares"
