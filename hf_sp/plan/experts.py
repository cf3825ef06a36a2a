"""Mixture-of-experts blocks: where the experts are, what else the block owns, and how it is split.

Experts are known by what they own, a packed ``gate_up_proj [E, 2f, H]`` and a ``down_proj
[E, H, f]``: transformers' plans name them in some families and versions and not in others. What a
plan says of a layer's dense MLP (``mlp.gate_proj``) holds for a shared expert inside a sparse one
(``mlp.shared_expert.gate_proj``), which no plan names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.check import Divisor
from hf_sp.plan.schema import Block, Experts, Leaf

# What a plan may say of experts, by what the key ends in; "" is the module itself.
_STYLES = {"": "moe_tp_experts", ".gate_up_proj": "packed_colwise", ".down_proj": "rowwise"}


def is_experts(module: nn.Module) -> bool:
    """Whether a module owns packed experts' weights, ``[E, 2f, H]`` and ``[E, H, f]``."""
    own = dict(module.named_parameters(recurse=False))
    packed, down = own.get("gate_up_proj"), own.get("down_proj")
    if packed is None or down is None or len(own) != 2 or packed.dim() != 3 or down.dim() != 3:
        return False
    count, width, hidden = packed.shape
    return width % 2 == 0 and tuple(down.shape) == (count, hidden, width // 2)


def without_experts(
    name: str, styles: Mapping[str, str], modules: Mapping[str, nn.Module]
) -> dict[str, str]:
    """The plan's keys but for those of experts, which are checked here.

    Raises:
        PlanError: a key gives experts a style that hf_sp does not carry out.
    """
    paths = [path for path, module in modules.items() if is_experts(module)]
    rest: dict[str, str] = {}
    wrong = []
    for key, style in styles.items():
        pattern = re.compile(re.escape(key).replace(r"\*", r"\d+"))
        ends = [end for end in _STYLES if any(pattern.fullmatch(path + end) for path in paths)]
        if not ends:
            rest[key] = style
        elif style != _STYLES[ends[0]]:
            wrong.append(f"{key}: {style}")
    if wrong:
        raise PlanError(
            f"{name}: the plan splits experts in a way that hf_sp does not carry out",
            where="\n".join(wrong),
            rule="gate_up_proj is split on both of its packed halves, down_proj on its input; "
            "whole experts are split over the ranks by parallelize(..., ep=tp)",
            legal=", ".join(f"{end or 'experts'}: {style}" for end, style in _STYLES.items()),
        )
    return rest


def experts_block(
    modules: Mapping[str, nn.Module],
    path: str,
    experts: str,
    dense: Mapping[str, str],
    ep: int,
    divisors: list[Divisor],
) -> Block:
    """The block of a sparse layer.

    Args:
        modules: all modules by path.
        path: the block, a child of a decoder layer.
        experts: its experts.
        dense: what the plan says of the same child in a dense layer: relative path -> style.
        ep: expert parallel degree; above 1 whole experts are split, else their features.
        divisors: gets the sizes that tp has to divide.

    Raises:
        PlanError: the block owns weights that are understood neither as its router nor as a shared
            expert nor as that expert's gate.
    """
    count, width, hidden = modules[experts].get_parameter("gate_up_proj").shape
    if ep == 1:
        divisors.append(Divisor("expert features", width // 2, experts))
    router, shared, leaves = "", "", []
    for other, module in modules.items():
        own = {n: p for n, p in module.named_parameters(recurse=False) if p is not None}
        if not other.startswith(path + ".") or not own or other == experts:
            continue
        inside = other.removeprefix(path + ".")
        owner, _, name = inside.rpartition(".")
        weight = own.get("weight")
        two = weight is not None and weight.dim() == 2
        shape = (weight.shape[0], weight.shape[1]) if weight is not None and two else (0, 0)
        plain = type(module) is nn.Linear
        if plain and owner and "." not in owner and name in dense and shared in ("", owner):
            style = dense[name]
            split = shape[0] if style == "column" else shape[1]
            divisors.append(Divisor("shared expert features", split, other))
            leaves.append(Leaf(other, "column" if style == "column" else "row", shape))
            shared = owner
        elif plain and not owner and set(own) == {"weight"} and shape == (1, hidden):
            leaves.append(Leaf(other, "replicated", shape))
        elif not owner and set(own) == {"weight"} and shape == (count, hidden) and not router:
            router = other
        else:
            raise _unknown(other, f"{next(iter(own))} {tuple(next(iter(own.values())).shape)}")
    kinds = {leaf.style for leaf in leaves if leaf.style != "replicated"}
    if not router or kinds not in (set(), {"column", "row"}):
        raise _unknown(path, "no router" if not router else f"a shared expert of {kinds} linears")
    found = Experts(
        experts,
        router,
        f"{path}.{shared}" if shared else "",
        "features" if ep == 1 else "experts",
        count,
        width // 2,
        hidden,
    )
    return Block(path, tuple(leaves), experts=found)


def _unknown(where: str, got: str) -> PlanError:
    return PlanError(
        "a mixture-of-experts block is of another form than hf_sp knows",
        where=where,
        got=got,
        rule="beside the experts a block may own a router (one weight [E, H]), a shared expert "
        "whose linears are named as the dense MLP's of the plan, and that expert's gate (a linear "
        "to 1 feature); each rank computes on its own part, so that any other weight would "
        "silently get a partial gradient",
    )


def check_ep(name: str, tp: int, sp: bool, ep: int, blocks: list[Block], dp_shard: int = 1) -> None:
    """Refuse an expert parallel degree that this model or this release does not have.

    Args:
        name: of the model.
        tp: tensor parallel degree.
        sp: whether tokens are sharded over tp.
        ep: the degree that was asked for.
        blocks: the model's.
        dp_shard: data parallel ranks that ep may span beside tp.

    Raises:
        PlanError: with the legal values.
    """
    if ep == 1:
        return
    sparse = [block.experts for block in blocks if block.experts is not None]
    problem, rule, degrees = "", "", {1}
    if not sparse:
        problem, rule = "no layer has experts", "ep splits the experts of sparse layers"
    elif ep not in (tp, tp * dp_shard):
        problem = f"ep={ep}, tp={tp}" + (f", dp_shard={dp_shard}" if dp_shard > 1 else "")
        rule = "experts are split over the ranks of the tp axis, or over those of tp and dp_shard "
        rule += "together (with dp_replicate=1)"
        degrees = {1, tp, tp * dp_shard}
    elif not sp:
        problem = "sp=False"
        rule = "each rank sends its own tokens to the experts: without sequence shards every rank "
        rule += "holds all tokens and would send each tp times"
    elif any(experts.count % ep for experts in sparse):
        count = next(experts.count for experts in sparse if experts.count % ep)
        problem = f"experts={count}, {count} % {ep} = {count % ep}"
        rule = "ep must divide the number of experts"
        degrees = {1, tp, tp * dp_shard}
    degrees = {d for d in degrees if not any(experts.count % d for experts in sparse)}
    legal = "ep = " + ", ".join(map(str, sorted(degrees)))
    if problem:
        raise PlanError(f"ep={ep} cannot be used with {name}", got=problem, rule=rule, legal=legal)
