"""Which degrees a model's sizes allow: all problems told at once, with the legal values."""

from __future__ import annotations

from hf_sp.errors import PlanError
from hf_sp.plan.schema import Plan

_KEY_VALUE = "num_key_value_heads"
_GROUPS = "groups of heads that share a state"
_REPLICABLE = _KEY_VALUE, _GROUPS


def check_tp(model: str, plan: Plan) -> None:
    """Refuse a ``tp`` that does not divide, naming each size once and the legal values.

    Raises:
        PlanError: some size is not divisible.
    """
    sizes: dict[tuple[str, int], str] = {}
    for block in plan.blocks:
        experts = block.experts
        if experts is not None and experts.split == "features":
            sizes.setdefault(("expert features", experts.intermediate), experts.path)
        query = max((leaf.heads for leaf in block.leaves), default=0)
        for leaf in block.leaves:
            if leaf.style == "replicated":
                continue
            name = "features" if experts is None else "shared expert features"
            if block.mixer:
                name = "heads of linear attention"
                if leaf.segments and block.mixer.shared:
                    sizes.setdefault((_GROUPS, block.mixer.shared), leaf.path)
                    sizes.setdefault(("features of a state", min(leaf.segments[2:4])), leaf.path)
            elif leaf.heads:
                # What is normalised over all heads is split by heads, and nothing else.
                fewer = leaf.style != "row" and leaf.heads < query and not block.over_heads
                name = _KEY_VALUE if fewer else "num_attention_heads"
            sizes.setdefault((name, leaf.parts), leaf.path)
    bad = [size for size in sizes if not _allows(*size, plan.tp)]
    if not bad:
        return
    largest = min((size for name, size in sizes if name not in _REPLICABLE), default=1)
    legal = [tp for tp in range(1, largest + 1) if all(_allows(*size, tp) for size in sizes)]
    best = max(tp for tp in legal if tp <= plan.tp)
    # On as many ranks: each group of tp takes a batch of its own.
    divides = best > 1 and plan.tp % best == 0
    remainders = (f"{name}={size}, {size} % {plan.tp} = {size % plan.tp}" for name, size in bad)
    raise PlanError(
        f"tp={plan.tp} cannot shard {model}",
        where="\n".join(sizes[size] for size in bad),
        got="\n".join(remainders),
        rule="a rank computes whole query heads, with the key/value heads that they attend to, and "
        "as many features as the others: tp must divide the query heads and the intermediate size, "
        "and divide the key/value heads or be a multiple of them",
        legal="tp = " + ", ".join(map(str, legal)),
        remedy=f"tp={best}" + (f", dp_shard={plan.tp // best}" if divides else ""),
    )


def _allows(name: str, size: int, tp: int) -> bool:
    """Whether ``tp`` divides a size, or is a multiple of one that may be replicated."""
    return size % tp == 0 or (name in _REPLICABLE and tp % size == 0)


def check_ep(model: str, plan: Plan, dp_shard: int) -> None:
    """Refuse an expert parallel degree that this model or this release does not have.

    Raises:
        PlanError: with the legal values.
    """
    tp, ep = plan.tp, plan.ep
    counts = [block.experts.count for block in plan.blocks if block.experts is not None]
    odd = next((count for count in counts if count % ep), None)
    if ep == 1:
        return
    if not counts:
        problem, rule = "no layer has experts", "ep splits the experts of sparse layers"
    elif ep not in (tp, tp * dp_shard):
        problem = f"ep={ep}, tp={tp}" + (f", dp_shard={dp_shard}" if dp_shard > 1 else "")
        rule = "experts are split over tp, or over tp and dp_shard with dp_replicate=1"
    elif not plan.sp:
        problem = "sp=False"
        rule = "without sequence shards every rank has all tokens and would send each tp times"
    elif odd is not None:
        problem = f"experts={odd}, {odd} % {ep} = {odd % ep}"
        rule = "ep must divide the number of experts"
    else:
        return
    degrees = {1, tp, tp * dp_shard} if counts and plan.sp else {1}
    legal = sorted(d for d in degrees if not any(count % d for count in counts))
    raise PlanError(
        f"ep={ep} cannot be used with {model}",
        got=problem,
        rule=rule,
        legal="ep = " + ", ".join(map(str, legal)),
    )
