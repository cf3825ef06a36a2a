"""Norms, gated MLPs and mixture-of-experts blocks whose maths is known, by their forward's text.

transformers copies a forward's text from model to model, so the text says what a module computes
(``source.py``: when two texts are one). A norm or MLP that matches no form keeps its own forward,
which is always right; a sparse block is refused. Must not know tensor parallelism.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.forms import FORMS
from hf_sp.plan.outer import class_name
from hf_sp.plan.schema import Plan
from hf_sp.plan.source import known

Casting = Literal["llama", "gemma", "gpt_oss"]
Gating = tuple[Literal["silu", "gelu_tanh", "clamped"], float, float]
"""Argument of ``hf_sp.kernels.swiglu``: what makes one of gate and up."""
SILU: Gating = ("silu", 1.0, 0.0)
GELU_TANH: Gating = ("gelu_tanh", 1.0, 0.0)


@dataclass(frozen=True, slots=True)
class NormForm:
    """An RMS norm's maths; arguments of ``hf_sp.kernels.rms_norm``."""

    casting: Casting  # where it rounds
    offset: float  # added to the weight
    eps: float  # added to the mean square
    float64: bool = False  # agrees in float64 too, where the order of the casts shows


@dataclass(frozen=True, slots=True)
class GatedForm:
    """Names of the linears of ``down(act(gate(x)) * up(x))``.

    Without ``up``, both are packed in ``gate``.
    """

    gate: str
    up: str
    down: str
    gating: Gating = SILU


# casting, offset, whether our float64 is theirs: not where the others, gpt_oss's, cast the weight.
_NORMS: dict[str, tuple[Casting, float, bool]] = {
    "llama": ("llama", 0.0, True),
    "gpt_oss": ("gpt_oss", 0.0, True),
    "gemma": ("gemma", 1.0, True),
}


def norm_form(module: nn.Module) -> NormForm | None:
    """The form of a norm whose one parameter is ``weight [N]``, None if it is not known."""
    found = known(module, FORMS["norm"])
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    if found is None or weight is None or weight.dim() != 1 or not alone:
        return None
    name, roles = found
    values = {role: module.__dict__.get(attribute) for role, attribute in roles.items()}
    eps = values["eps"]
    if roles["weight"] != "weight" or not isinstance(eps, float) or not values.get("scaled", True):
        return None
    casting, offset, float64 = _NORMS.get(name, ("gpt_oss", 0.0, False))
    return NormForm(casting, offset, eps, float64)


@dataclass(frozen=True, slots=True)
class GatedNormForm:
    """A norm of what a mixer has made, with a gate: over groups of features, or all."""

    groups: int
    eps: float
    gated_first: bool  # the gate is multiplied before the norm
    casting: Literal["input", "result"]  # what is rounded to the dtype: before the weight, or all


def gated_norm_form(module: nn.Module) -> GatedNormForm | None:
    """The form of a mixer's gated norm, None if it is not known. Of the norm as it is stored."""
    found = known(module, FORMS["gated_norm"])
    if found is None:
        return None
    name, roles = found
    own, size = module.__dict__, module.get_parameter(roles["weight"]).numel()
    eps = own[roles["eps"]]
    if name.startswith("falcon"):
        return GatedNormForm(
            own[roles["n_groups"]], eps, not own[roles["norm_before_gate"]], "result"
        )
    groups = 1 if name == "all" else size // own[roles["group_size"]]
    return GatedNormForm(groups, eps, True, "input")


def gated_norm_groups(module: nn.Module, path: str) -> int:
    """Over how many groups of features a mixer's gated norm is.

    Raises:
        PlanError: its form is not known.
    """
    form = gated_norm_form(module)
    if form is None:
        raise PlanError(
            "a norm over the features of a mixer's heads computes something that hf_sp does not "
            "know",
            where=path,
            got=class_name(module),
            rule="each rank has a part of the features that its mean is over",
            legal="a forward with the text of a known gated norm: "
            + ", ".join(FORMS["gated_norm"]),
        )
    return form.groups


def gated_form(module: nn.Module, columns: list[str], row: str) -> GatedForm | None:
    """The form of a gated MLP with these linears, None if it computes something else."""
    found = known(module, FORMS["gated"])
    gating = found and _gating(module, found[1])
    if found is None or gating is None:
        return None
    roles = found[1]
    form = GatedForm(roles["gate"], roles.get("up", ""), roles["down"], gating)
    return form if {*columns} == {form.gate, form.up} - {""} and row == form.down else None


def experts_gating(module: nn.Module) -> Gating:
    """What experts of a known form (``check_sparse_blocks``) make of gate and up."""
    found = known(module, FORMS["experts"])
    gating = _gating(module, found[1]) if found else None
    assert gating is not None
    return gating


def check_sparse_blocks(model: nn.Module, plan: Plan) -> None:
    """Refuse experts, routers and blocks of another form. Changes nothing.

    Parts of a block's output are summed over the ranks and its gradients are sums of parts: right
    only if the block is linear in what its experts return and treats each token by itself, and if
    the experts are gated SiLU MLPs.

    Raises:
        PlanError: naming the module.
    """
    for block in plan.blocks:
        experts = block.experts
        if experts is None:
            continue
        owned = model.get_submodule(experts.path)._parameters
        _check("experts", model, experts.path, {_EXPERTS_ROLES[name]: name for name in owned})
        if not experts.router:
            continue  # nothing is around them but the layer, which each rank runs on its tokens
        gate = next((leaf.path for leaf in block.leaves if leaf.style == "replicated"), "")
        paths = {"router": experts.chooser, "experts": experts.path, "shared": experts.shared}
        paths["shared_gate"] = gate
        names = {role: path.removeprefix(f"{block.path}.") for role, path in paths.items() if path}
        names |= _own(model, block.path)
        own = _own(model, experts.chooser)
        if experts.router != experts.chooser:
            own["linear"] = experts.router.rpartition(".")[2]
        for path in block.alike:
            owner, _, name = path.rpartition(".")
            if owner == experts.chooser:
                own["correction"] = name
                _check("correction", model, path, _own(model, path))
        _check("router", model, experts.chooser, own)
        _check("block", model, block.path, names)


def _own(model: nn.Module, path: str) -> dict[str, str]:
    """A module's parameters: the names of their roles, where they have the same."""
    owned = model.get_submodule(path)._parameters
    return {name: name for name, p in owned.items() if p is not None}


_EXPERTS_ROLES = {
    "gate_up_proj": "gate_up",
    "down_proj": "down",
    "gate_up_proj_bias": "gate_up_bias",
    "down_proj_bias": "down_bias",
}
_RULES = {
    "correction": "it is added to the probabilities that experts are chosen by",
    "experts": "gate and up packed, SiLU, tanh GELU or gpt-oss's product",
    "router": "(logits [T, E], weights [T, k], experts [T, k]) of each token by itself",
    "block": "parts see the tokens as they are; linear in what the experts return, token by token",
}


def _check(kind: str, model: nn.Module, path: str, parts: dict[str, str]) -> None:
    """Refuse a module of no known form, or one in which others than ``parts`` have the roles."""
    module = model.get_submodule(path)
    # A router keeps its forward: one that is bound to it alone counts as its class's.
    found = known(module, FORMS[kind], bound=kind == "router")
    roles, owned = found[1] if found else {}, {*module._parameters, *module._modules}
    used = {role: a for role, a in roles.items() if role != "act" and a in owned}
    if not found or used != parts or _gating(module, roles) is None:
        raise PlanError(
            "a part of a mixture-of-experts block computes something that hf_sp does not know",
            where=path,
            got=class_name(module),
            rule=_RULES[kind],
            legal=f"a forward with the text of a known {kind}: " + ", ".join(FORMS[kind]),
            remedy="leave transformers' class, its forward and its activation as they are",
        )


def _gating(module: nn.Module, roles: dict[str, str]) -> Gating | None:
    """What a form makes of gate and up; None if its activation is not known."""
    if "limit" in roles:
        alpha: Any = module.__dict__.get(roles["alpha"])
        limit: Any = module.__dict__.get(roles["limit"])
        numbers = isinstance(alpha, float) and isinstance(limit, float)
        return ("clamped", alpha, limit) if numbers else None
    name = roles.get("act", "")
    act: Any = module._modules.get(name) or module.__dict__.get(name)
    if type(act) in (nn.SiLU, nn.GELU):
        tanh = getattr(act, "approximate", "tanh") == "tanh" and "forward" not in act.__dict__
        return (SILU if type(act) is nn.SiLU else GELU_TANH) if tanh else None
    if isinstance(act, nn.Module):
        form, inner = known(act, FORMS["activation"]) or ("", {})
        if form == "calls":
            act = act.__dict__.get(inner["act"])
            gelu = isinstance(act, functools.partial) and act.func is torch.nn.functional.gelu
            return GELU_TANH if gelu and act.keywords == {"approximate": "tanh"} else None
        return SILU if form else None
    return SILU if not name or act is F.silu else None
