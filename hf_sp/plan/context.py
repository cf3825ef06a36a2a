"""What context parallelism asks of a model: attentions whose code calls one of transformers'."""

from __future__ import annotations

import inspect

from hf_sp.errors import PlanError
from hf_sp.plan.outer import Modules, class_name, inside
from hf_sp.plan.schema import Block, Mixer, Plan

# What an attention may be given. Positions and caches are known by these names.
_GIVEN = {
    *("hidden_states", "attention_mask", "position_embeddings", "position_ids", "cache_position"),
    *("cache", "past_key_values", "layer_past", "use_cache", "output_attentions"),
}


def check_cp(name: str, plan: Plan, modules: Modules, cp: int) -> None:
    """Refuse a context parallel degree that the model does not allow, whatever ranks exchange.

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
        # An MLP alone looks at each token by itself.
        if not any(inside(block.path, layer) for block in plan.blocks):
            raise PlanError(
                f"cp={cp} cannot be used with {name}",
                where=layer,
                got="a layer without a block that hf_sp knows",
                rule="between its attentions a rank has a part of the tokens: nothing else may "
                "look at several",
                legal="cp=1; tp and sp split such a model",
            )
    mixers = {block.mixer: block.path for block in attentions if block.mixer is not None}
    legal = [d for d in range(1, cp + 1) if all(_divides(one, plan.tp, d) for one in mixers)]
    if legal[-1] != cp:
        mixer = next(one for one in mixers if not _divides(one, plan.tp, cp))
        shared = f", in {mixer.shared} groups that share a state" if mixer.shared else ""
        raise PlanError(
            f"cp={cp} cannot be used with {name}",
            where=mixers[mixer],
            got=f"{mixer.heads} heads of a mixer{shared}, on tp * cp = {plan.tp * cp} ranks",
            rule="whatever attentions do, each rank scans all tokens of as many whole heads, of "
            "whole groups or a part of one",
            legal=f"at tp={plan.tp}: cp = " + ", ".join(map(str, legal)),
        )


def _divides(mixer: Mixer, tp: int, cp: int) -> bool:
    ranks, groups = tp * cp, mixer.shared
    return mixer.heads % ranks == 0 and not (groups and groups % ranks and ranks % groups)


def _check_code(block: Block, modules: Modules) -> None:
    module = modules[block.path]
    forward = inspect.unwrap(type(module).forward)
    known = inspect.signature(forward).parameters.values()
    given = {p.name for p in known if p.kind is p.POSITIONAL_OR_KEYWORD} - {"self"}
    calls = {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"} <= {*forward.__code__.co_names}
    of_heads = {path.rpartition(".")[2] for path in block.of_heads}
    own = [n for n, p in module.named_parameters(recurse=False) if n not in of_heads]
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
