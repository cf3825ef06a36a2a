"""Norms, gated MLPs and mixture-of-experts blocks whose maths is known, by their forward's text.

transformers copies a forward's text from model to model, so the text says what a module computes
(``source.py``: when two texts are one). A norm or MLP that matches no form keeps its own forward,
which is always right; a sparse block is refused. Must not know tensor parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.forms import FORMS
from hf_sp.plan.outer import class_name
from hf_sp.plan.schema import Plan
from hf_sp.plan.source import known

Casting = Literal["llama", "gemma", "gpt_oss"]


@dataclass(frozen=True, slots=True)
class NormForm:
    """An RMS norm's maths; arguments of ``hf_sp.kernels.rms_norm``."""

    casting: Casting  # where it rounds
    offset: float  # added to the weight
    eps: float  # added to the mean square
    float64: bool = False  # agrees in float64 too, where the order of the casts shows


@dataclass(frozen=True, slots=True)
class GatedForm:
    """Names of the linears of ``down(silu(gate(x)) * up(x))``."""

    gate: str
    up: str
    down: str


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


def gated_form(module: nn.Module, columns: list[str], row: str) -> GatedForm | None:
    """The form of a gated SiLU MLP with these linears, None if it computes something else."""
    found = known(module, FORMS["gated"])
    if found is None or not _silu(module, found[1]):
        return None
    form = GatedForm(*(found[1][role] for role in ("gate", "up", "down")))
    return form if {*columns} == {form.gate, form.up} and row == form.down else None


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
        gate = next((leaf.path for leaf in block.leaves if leaf.style == "replicated"), "")
        paths = {"router": experts.router, "experts": experts.path, "shared": experts.shared}
        paths["shared_gate"] = gate
        names = {role: path.removeprefix(f"{block.path}.") for role, path in paths.items() if path}
        packed = {"gate_up": "gate_up_proj", "down": "down_proj"}
        _check("experts", model, experts.path, packed)
        _check("router", model, experts.router, {"weight": "weight"})
        _check("block", model, block.path, names)


_RULES = {
    "experts": "gate and up packed in halves, SiLU, no bias",
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
    if not found or used != parts or not _silu(module, roles):
        raise PlanError(
            "a part of a mixture-of-experts block computes something that hf_sp does not know",
            where=path,
            got=class_name(module),
            rule=_RULES[kind],
            legal=f"a forward with the text of a known {kind}: " + ", ".join(FORMS[kind]),
            remedy="leave transformers' class, its forward and its activation as they are",
        )


def _silu(module: nn.Module, roles: dict[str, str]) -> bool:
    """Whether the activation, if the form has one, is SiLU."""
    name = roles.get("act", "")
    act = module._modules.get(name) or module.__dict__.get(name)
    if type(act) is nn.SiLU:
        return "forward" not in act.__dict__
    if isinstance(act, nn.Module):
        return known(act, FORMS["silu"]) is not None
    return not name or act is F.silu
