"""What context parallelism asks of a model: attentions whose code calls one of transformers'."""

from __future__ import annotations

import inspect

from hf_sp.errors import PlanError
from hf_sp.plan.outer import Modules, class_name, inside
from hf_sp.plan.schema import Block, Plan

# What an attention may be given. Positions and caches are known by these names.
_GIVEN = {
    *("hidden_states", "attention_mask", "position_embeddings", "position_ids", "cache_position"),
    *("cache", "past_key_values", "layer_past", "use_cache", "output_attentions"),
}


def check_cp(name: str, plan: Plan, modules: Modules, cp: int) -> None:
    """Refuse a context parallel degree that the model or its heads do not allow.

    Raises:
        PlanError: with the legal values.
    """
    if cp == 1:
        return
    attentions = [block for block in plan.blocks if block.attention]
    more = {
        "dropout of hidden states": plan.dropout,
        "arguments of layers by token": plan.per_token,
    }
    if got := [what for what, present in more.items() if present]:
        raise PlanError(
            f"cp={cp} cannot be used with {name}",
            where=plan.layers[0],
            got=", ".join(got),
            rule="context parallel ranks have a part of the tokens each, which these do not know",
            legal="cp=1; tp and sp split such a model. Without dropout in its config, cp too",
        )
    for block in attentions:
        if block.mixer is None:
            _check_code(block, modules)
    for layer in plan.layers:
        if not any(inside(block.path, layer) for block in attentions):
            raise PlanError(
                f"cp={cp} cannot be used with {name}",
                where=layer,
                got="a layer without an attention that hf_sp knows",
                rule="between its attentions a rank has a part of the tokens: nothing else may "
                "look at several",
                legal="cp=1; tp and sp split such a model",
            )
    heads = {next(leaf.heads for leaf in b.leaves if leaf.style == "row"): b for b in attentions}
    mixers = [b.mixer for b in attentions if b.mixer and b.mixer.shared]
    ranks = plan.tp * cp
    if odd := next((m.shared for m in mixers if m.shared % ranks and ranks % m.shared), 0):
        raise PlanError(
            f"cp={cp} cannot be used with {name}",
            got=f"tp * cp = {ranks}, {odd} groups of heads that share a state",
            rule="the ranks have whole groups each, or several of them a group",
            legal=f"tp * cp that divides {odd}, or is a multiple of it",
        )
    if wrong := [n for n in heads if n // plan.tp % cp]:
        n = max(wrong)
        most = min(heads) // plan.tp
        legal = [d for d in range(1, most + 1) if all(n // plan.tp % d == 0 for n in heads)]
        what = "num_attention_heads" if heads[n].mixer is None else "heads of a mixer"
        raise PlanError(
            f"cp={cp} cannot be used with {name}",
            where=heads[n].path,
            got=f"{what}={n}, {n // plan.tp} of them on each of tp={plan.tp} ranks",
            rule="each context parallel rank attends, or scans, with as many of a tp rank's heads",
            legal=f"at tp={plan.tp}: cp = " + ", ".join(map(str, legal)),
        )


def _check_code(block: Block, modules: Modules) -> None:
    module = modules[block.path]
    forward = inspect.unwrap(type(module).forward)
    known = inspect.signature(forward).parameters.values()
    given = {p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD} - {"self"}
    calls = {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"} <= {*forward.__code__.co_names}
    own = [n for n, p in module.named_parameters(recurse=False) if p is not None]
    if calls and given <= _GIVEN and not own and "config" in module.__dict__:
        return
    problem = f"it is given {', '.join(sorted(given - _GIVEN))}" if given - _GIVEN else ""
    problem = problem or (f"it has {own[0]} of its own" if own else "it computes its own attention")
    raise PlanError(
        "an attention cannot be given a part of the sequence",
        where=f"{block.path} ({class_name(module)})",
        got=problem,
        rule="context parallelism stands in front of the attention functions of transformers, for "
        "attentions that are given hidden states, positions, masks and caches alone",
        legal="cp=1; tp and sp split such a model",
    )
