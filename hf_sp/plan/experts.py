"""Mixture-of-experts blocks: where the experts are, what else the block owns, and how it is split.

Experts are known by what they own, a packed ``gate_up_proj [E, 2f, H]`` and a ``down_proj
[E, H, f]``, or the transposed ones, and biases or none: transformers' plans name them in some
families and versions and not in others. What a plan says of a layer's dense MLP (``mlp.gate_proj``)
holds for a shared expert inside a sparse one (``mlp.shared_expert.gate_proj``), which no plan
names.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.outer import Modules, inside, owners
from hf_sp.plan.schema import Block, Experts, Kind, Leaf

# What a plan may say of experts, by what the key ends in; "" is the module itself.
STYLES = {"": "moe_tp_experts", ".gate_up_proj": "packed_colwise", ".down_proj": "rowwise"}


def is_experts(module: nn.Module) -> bool:
    """Whether a module owns packed experts' weights."""
    return _sizes(module) is not None


def packed_experts(module: nn.Module) -> dict[str, int]:
    """Experts' parameters that hold gate and up as halves -> the dim that does."""
    if not is_experts(module) or not getattr(module, "is_concatenated", True):
        return {}
    dims = {"gate_up_proj": 2 if getattr(module, "is_transposed", False) else 1}
    return {**dims, "gate_up_proj_bias": 1} if "gate_up_proj_bias" in module._parameters else dims


def _sizes(module: nn.Module) -> tuple[int, int, int] | None:
    """Experts, features and hidden size of packed experts' weights, None for other modules."""
    own = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    packed, down = own.pop("gate_up_proj", ()), own.pop("down_proj", ())
    if len(packed) != 3 or len(down) != 3:
        return None
    count, width, hidden = packed
    if getattr(module, "is_transposed", False):
        width, hidden, down = hidden, width, (down[0], down[2], down[1])
    biases = {"gate_up_proj_bias": (count, width), "down_proj_bias": (count, hidden)}
    if width % 2 or down != (count, hidden, width // 2) or (own and own != biases):
        return None
    return count, width // 2, hidden


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
        if len(names) > 1 or child in found:
            raise PlanError(
                "experts do not stand where a block of a layer has its experts",
                where=path,
                rule="one set of experts, a child of a decoder layer or of its child (mlp.experts)",
            )
        found[child] = path
    return found


def experts_block(
    modules: Modules, path: str, experts: str, dense: Mapping[str, Kind], ep: int
) -> Block:
    """The sparse block at ``path``; ``dense`` is what the plan says of that place in a dense layer.

    Where the layer itself owns the experts, they are the block: it is given routed tokens. With ep
    above 1 whole experts are split, else their features.

    Raises:
        PlanError: the block owns weights that are understood neither as its router nor as a shared
            expert nor as that expert's gate.
    """
    sizes = _sizes(modules[experts])
    assert sizes is not None
    count, features, hidden = sizes
    router, shared, leaves, alike = "", "", [], []
    odd: dict[str, str] = {}
    for other, own in owners(modules, path):
        if other == experts:
            continue
        owner, _, name = other.removeprefix(f"{path}.").rpartition(".")
        linear = type(modules[other]) is nn.Linear
        kind = dense.get(other, dense.get(f"{path}.{name}", "partial"))
        size = tuple(own["weight"].shape) if "weight" in own else ()
        child = not owner and len(own) == 1
        corrections = {n for n, p in own.items() if not p.requires_grad and p.numel() == count}
        # A child, or the one linear of a child.
        routes = {*own} - corrections <= {"weight", "bias"} and "." not in owner
        routes = routes and (linear or not owner)
        if {*own} == corrections:
            alike.append(other)  # a correction of the routing
            continue
        inner = linear and owner and "." not in owner and shared in ("", owner)
        if inner and (kind == "column" or kind == "row"):
            leaves.append(Leaf(other, kind, (size[0], size[1])))
            shared = owner
        elif linear and child and size == (1, hidden):
            leaves.append(Leaf(other, "replicated", (1, hidden)))
        elif routes and size == (count, hidden) and not router:
            router = other
        else:
            odd[other] = f"{next(iter(own))} {tuple(next(iter(own.values())).shape)}"
    kinds = {leaf.style for leaf in leaves if leaf.style != "replicated"}
    if not router and path != experts:
        odd.setdefault(path, "no router")
    if kinds not in (set(), {"column", "row"}):
        odd.setdefault(path, f"a shared expert of {kinds} linears")
    if odd:
        raise PlanError(
            "a mixture-of-experts block is of another form than hf_sp knows",
            where="\n".join(odd),
            got="\n".join(odd.values()),
            rule="beside experts: a router (a weight [E, H]), a shared expert whose linears have "
            "the names of the plan's dense MLP, its gate (a linear to 1 feature); any other weight "
            "would silently get a partial gradient",
        )
    split: Literal["features", "experts"] = "features" if ep == 1 else "experts"
    shared = f"{path}.{shared}" if shared else ""
    form: Any = modules[experts]
    chooser = router.removeprefix(f"{path}.").partition(".")[0]
    found = Experts(
        experts,
        router,
        f"{path}.{chooser}" if router else "",
        shared,
        split,
        count,
        features,
        hidden,
        transposed=getattr(form, "is_transposed", False),
        interleaved=not getattr(form, "is_concatenated", True),
        bias="gate_up_proj_bias" in form._parameters,
    )
    return Block(path, tuple(leaves), experts=found, alike=tuple(alike))
