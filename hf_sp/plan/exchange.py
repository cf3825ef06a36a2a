"""What context parallel ranks exchange: heads for tokens, keys around a ring, or both."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass

from hf_sp.errors import PlanError
from hf_sp.plan.outer import Modules
from hf_sp.plan.schema import Block, Plan


@dataclass(frozen=True, slots=True)
class Exchange:
    """What the user says of how context parallel ranks attend.

    Args:
        mode: "ulysses", "ring", "hybrid"; None chooses.
        ulysses: of hybrid, how many neighbouring ranks exchange heads; None chooses.
        node: ranks of a machine, 0 where that is not known.
    """

    mode: str | None = "ulysses"
    ulysses: int | None = None
    node: int = 0


def choose_ring(name: str, plan: Plan, modules: Modules, how: Exchange) -> int:
    """How many places of a ring the context parallel ranks are; 1 is Ulysses alone.

    Left to choose, neighbouring ranks exchange heads as far as heads and the machine allow, and a
    ring goes around what is left of cp.

    Raises:
        PlanError: cp, or what it was asked to exchange, is not for this model; with legal values.
    """
    cp, tp = plan.cp, plan.tp
    attentions = [block for block in plan.blocks if block.attention and block.mixer is None]
    if cp == 1 or not attentions:
        return 1
    heads = {next(leaf.heads for leaf in b.leaves if leaf.style == "row") for b in attentions}
    local = min(n // tp for n in heads)
    fitting = [d for d in range(1, local + 1) if all(n // tp % d == 0 for n in heads)]
    splits = [d for d in fitting if cp % d == 0]
    near = [d for d in splits if d == 1 or not how.node or tp * d <= how.node]
    amid = [d for d in splits if 1 < d < cp]
    inside = [d for d in amid if d in near]
    other = [(block.path, got) for block in attentions if (got := _beyond_a_ring(block, modules))]
    if how.mode == "ulysses" or (how.mode is None and other):
        ulysses = cp
    elif how.mode == "ring":
        ulysses = 1
    elif how.ulysses is not None:
        ulysses = how.ulysses
    else:
        ulysses = max(near if how.mode is None else inside or amid[:1], default=0)
    if ulysses == cp and cp not in splits:
        around = "" if other else "\nor cp_mode='ring', which heads do not limit"
        raise PlanError(
            f"cp={cp} cannot be used with {name}",
            where=attentions[0].path,
            got=f"num_attention_heads={max(heads)}, {local} of them on each of tp={tp} ranks",
            rule="each context parallel rank attends with as many of a tp rank's query heads",
            legal=f"at tp={tp}: cp = {', '.join(map(str, fitting))}{around}",
        )
    if how.mode == "hybrid" and ulysses not in amid:
        legal = [f"cp_ulysses = {', '.join(map(str, amid))}"] if amid else []
        legal += ["cp_mode='ulysses'"] if cp in splits else []
        raise PlanError(
            f"cp={cp} cannot be a ring of ranks that exchange heads",
            where=attentions[0].path,
            got=f"cp_ulysses={how.ulysses}, {local} query heads on each of tp={tp} ranks",
            rule="cp_ulysses divides cp and these heads, and is neither 1 nor cp",
            legal="; ".join([*legal, *([] if other else ["cp_mode='ring'"])]),
        )
    if ulysses < cp and other:
        raise PlanError(
            f"{name} cannot attend around a ring",
            where=other[0][0],
            got=other[0][1],
            rule="ring attention is a softmax of scores, scaled and masked",
            legal=f"cp_mode='ulysses'{'' if cp in splits else f', at cp = {splits[-1]}'}",
        )
    return cp // ulysses


# What a ring knows of what code hands to an attention function. Documents it has from the mask.
_OF_A_RING = {
    *("dropout", "scaling", "sliding_window", "is_causal", "attention_mask", "position_ids"),
    *("output_attentions", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("query", "key", "value"),
}


def _beyond_a_ring(block: Block, modules: Modules) -> str:
    """What an attention's numbers need beside scores, a scale and a mask; "" for nothing."""
    module = modules[block.path]
    if getattr(module, "attention_dropout", 0):
        return "dropout of attention weights; attention_dropout=0 in the config is none"
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or getattr(call.func, "id", "") != "attention_interface":
            continue
        for given in call.keywords:
            value = given.value
            of_self = isinstance(value, ast.Attribute) and getattr(value.value, "id", "") == "self"
            absent = of_self and getattr(module, value.attr, 0) is None  # type: ignore[attr-defined]
            if given.arg not in (None, *_OF_A_RING) and not absent:
                return f"{given.arg} (sinks, soft caps and the like)"
    return ""
