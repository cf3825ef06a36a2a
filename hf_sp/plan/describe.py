"""What is done to one block, in words: a line for the block and one for each of its modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_sp.plan.schema import Block, Leaf


def describe_block(block: Block, tp: int, sp: bool, ep: int = 1) -> Iterator[tuple[str, str]]:
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
    if leaf.style == "column_replicated" and leaf.heads == 1 and out == 1:
        return f"replicated, gradient summed over tp  [{out}, {into}]"
    local = {
        "column": (out // tp, into),
        "row": (out, into // tp),
        "column_replicated": (out // max(leaf.heads, 1), into),
    }[leaf.style]
    return f"{leaf.style:<8} [{out}, {into}] -> [{local[0]}, {local[1]}]{heads}"
