"""Mixture-of-experts blocks: where the experts are, what else the block owns, and how it is split.

Experts are known by what they own, a packed ``gate_up_proj [E, 2f, H]`` and a ``down_proj
[E, H, f]``: transformers' plans name them in some families and versions and not in others. What a
plan says of a layer's dense MLP (``mlp.gate_proj``) holds for a shared expert inside a sparse one
(``mlp.shared_expert.gate_proj``), which no plan names.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.outer import Modules, inside, owners
from hf_sp.plan.schema import Block, Experts, Kind, Leaf

# What a plan may say of experts, by what the key ends in; "" is the module itself.
STYLES = {"": "moe_tp_experts", ".gate_up_proj": "packed_colwise", ".down_proj": "rowwise"}


def is_experts(module: nn.Module) -> bool:
    """Whether a module owns packed experts' weights, ``[E, 2f, H]`` and ``[E, H, f]``."""
    own = dict(module.named_parameters(recurse=False))
    packed, down = own.get("gate_up_proj"), own.get("down_proj")
    if packed is None or down is None or len(own) != 2 or packed.dim() != 3 or down.dim() != 3:
        return False
    count, width, hidden = packed.shape
    return width % 2 == 0 and tuple(down.shape) == (count, hidden, width // 2)


def style_of_experts(key: str, experts: list[str]) -> str | None:
    """The one style that a plan may give to a key that names experts, None for other keys."""
    for end, style in STYLES.items():
        if any(fnmatchcase(path + end, key) for path in experts):
            return style
    return None


def sparse_blocks(experts: list[str], layer: str) -> dict[str, str]:
    """A layer's children that own experts -> the path of these.

    Raises:
        PlanError: experts stand elsewhere.
    """
    found: dict[str, str] = {}
    for path in (path for path in experts if inside(path, layer)):
        child, *names = path.removeprefix(f"{layer}.").split(".")
        if len(names) != 1 or child in found:
            raise PlanError(
                "experts do not stand where a block of a layer has its experts",
                where=path,
                rule="one set of experts, a child of a decoder layer's child (mlp.experts)",
            )
        found[child] = path
    return found


def experts_block(
    modules: Modules, path: str, experts: str, dense: Mapping[str, Kind], ep: int
) -> Block:
    """The sparse block at ``path``; ``dense`` is what the plan says of that place in a dense layer.

    With ep above 1 whole experts are split, else their features.

    Raises:
        PlanError: the block owns weights that are understood neither as its router nor as a shared
            expert nor as that expert's gate.
    """
    count, width, hidden = modules[experts].get_parameter("gate_up_proj").shape
    router, shared, leaves = "", "", []
    odd: dict[str, str] = {}
    for other, own in owners(modules, path):
        if other == experts:
            continue
        owner, _, name = other.removeprefix(f"{path}.").rpartition(".")
        linear = type(modules[other]) is nn.Linear
        kind = dense.get(other, dense.get(f"{path}.{name}", "partial"))
        size = tuple(own["weight"].shape) if "weight" in own else ()
        child = not owner and len(own) == 1
        inner = linear and owner and "." not in owner and shared in ("", owner)
        if inner and (kind == "column" or kind == "row"):
            leaves.append(Leaf(other, kind, (size[0], size[1])))
            shared = owner
        elif linear and child and size == (1, hidden):
            leaves.append(Leaf(other, "replicated", (1, hidden)))
        elif child and size == (count, hidden) and not router:
            router = other
        else:
            odd[other] = f"{next(iter(own))} {tuple(next(iter(own.values())).shape)}"
    kinds = {leaf.style for leaf in leaves if leaf.style != "replicated"}
    if not router:
        odd.setdefault(path, "no router")
    if kinds not in (set(), {"column", "row"}):
        odd.setdefault(path, f"a shared expert of {kinds} linears")
    if odd:
        raise PlanError(
            "a mixture-of-experts block is of another form than hf_sp knows",
            where="\n".join(odd),
            got="\n".join(odd.values()),
            rule="beside experts: a router (one weight [E, H]), a shared expert whose linears have "
            "the names of the plan's dense MLP, its gate (a linear to 1 feature); any other weight "
            "would silently get a partial gradient",
        )
    split: Literal["features", "experts"] = "features" if ep == 1 else "experts"
    shared = f"{path}.{shared}" if shared else ""
    found = Experts(experts, router, shared, split, count, width // 2, hidden)
    return Block(path, tuple(leaves), experts=found)
