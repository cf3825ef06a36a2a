"""Hugging Face plan strings to a ``Plan``.

Owns the reading of ``model.tp_plan`` and of the module tree; refuses a model that it does not
understand whole. Runs on meta tensors; changes nothing.

A plan key such as ``model.layers.*.self_attn.q_proj`` names a linear inside a decoder layer. The
layer's child that owns it (``self_attn``) is the TP block. Nothing here is written per family:
what a family needs beyond its own plan strings is a row in ``families``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.blocks import tp_block
from hf_sp.plan.check import check_ep, check_tp
from hf_sp.plan.context import check_cp
from hf_sp.plan.exchange import Exchange, choose_ring
from hf_sp.plan.experts import STYLES as EXPERTS_STYLES
from hf_sp.plan.experts import experts_block, is_experts, sparse_blocks, style_of_experts
from hf_sp.plan.families import DROPOUT, plan_strings
from hf_sp.plan.outer import (
    Modules,
    find_beside,
    find_embedding,
    find_final_norm,
    find_head,
    find_outside,
    inside,
    owners,
)
from hf_sp.plan.schema import Block, Kind, Plan

_EXAMPLE = "parallelize(..., plan={'model.layers.*.self_attn.q_proj': 'colwise', ...})"
# HF's strings -> what we do to a module of a layer.
_STYLES: dict[str, Kind] = {
    "colwise": "column",
    "rowwise": "row",
    "replicated_with_grad_allreduce": "partial",
    "packed_colwise": "packed",
    "mla_kv_a_proj": "replicated",
    "colwise_by_head": "column_by_head",
    "replicate": "alike",
}
# Styles of modules outside the layers; how these are split is read off the modules themselves.
_OUTER_STYLES = {"colwise_gather_output", "colwise", "embedding_rowwise", "replicate"}
# Of an argument of the layers, not a module: it has a row for each token.
_OF_ARGUMENTS = {"sequence"}
# Of a module's own parameters, a number for each head (sinks).
_OF_PARAMETERS = "local_params"


def derive_plan(
    model: nn.Module,
    tp: int,
    sp: bool,
    styles: Mapping[str, str] | None = None,
    ep: int = 1,
    dp_shard: int = 1,
    cp: int = 1,
    exchange: Exchange | None = None,
) -> Plan:
    """Read a model's plan and check that hf_sp can carry it out whole at this ``tp``.

    Args:
        model: a transformers model; may be on meta.
        tp: tensor parallel degree.
        sp: whether hidden states are sharded along the sequence.
        styles: plan strings to use instead of ``model.tp_plan``.
        ep: expert parallel degree.
        dp_shard: data parallel ranks that ep may span beside tp.
        cp: context parallel degree.
        exchange: what these ranks were asked to exchange; Ulysses by default.

    Raises:
        PlanError: no plan, an unknown style, a key that matches nothing, a weight that no key
            claims, a layer of another shape than the plan needs, sizes that tp cannot divide, or
            an ep or a cp that the model or this release does not have.
    """
    name = type(model).__name__
    given = None if styles is None else "plan="
    styles = plan_strings(model) if styles is None else styles
    texts = isinstance(styles, Mapping) and all(type(x) is str for x in (*styles, *styles.values()))
    if not styles or not texts:
        raise PlanError(
            "plan is a dict of strings" if given else f"{name} has no tensor parallel plan",
            where=given or f"{name}.tp_plan",
            got=repr(styles),
            rule="hf_sp derives the split of each layer from the model's own plan strings",
            remedy=_EXAMPLE,
        )
    family = getattr(model.config, "model_type", name)
    modules = dict(model.named_modules())
    known = {*modules, *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    experts = [path for path, module in modules.items() if is_experts(module)]
    container, keys, per_token = _layered_keys(name, styles, modules, experts, given)
    decoder = container.rpartition(".")[0]
    stack = list(cast(nn.ModuleList, modules[container]))
    if len(set(stack)) != len(stack):
        raise PlanError(
            "one decoder layer stands in several places",
            where=container,
            rule="each layer is sharded once",
        )
    layers = tuple(f"{container}.{i}" for i in range(len(stack)))
    blocks: list[Block] = []
    norms: list[str] = []
    matched: set[str] = set()
    for layer in layers:
        sparse = sparse_blocks(experts, layer)
        for child in dict.fromkeys([*(key.partition(".")[0] for key in keys), *sparse]):
            path = f"{layer}.{child}"
            named = {f"{layer}.{key}": kind for key, kind in keys.items() if inside(key, child)}
            token_wise = path in modules and named.get(path) == "partial"
            if child in sparse:
                # The keys are those of a dense MLP, which the model may not have.
                blocks.append(experts_block(modules, path, sparse[child], named, ep))
            else:
                named = {key: kind for key, kind in named.items() if key in known}
                if named and not token_wise:
                    blocks.append(tp_block(model, modules, path, named, tp))
            matched |= {key.removeprefix(f"{layer}.") for key in named}
        own = [block for block in blocks if inside(block.path, layer)]
        norms += _norms(modules, layer, own, [f"{layer}.{key}" for key in keys])
    missing = [f"{container}.*.{name}" for name in per_token if name not in _arguments(stack[0])]
    missing += [f"{container}.*.{key}" for key in sorted(keys.keys() - matched)]
    missing += [key for key in styles if ".*." not in key and key not in modules]
    if missing:
        raise PlanError(
            f"{name}: plan keys match no module",
            where="\n".join(missing),
            rule="where a key matches no module, a weight would silently stay whole",
        )
    dropout = _drops(model, modules, container)
    if dropout and (family not in DROPOUT or any(block.experts for block in blocks)):
        _refuse_dropout(dropout)
    embedding = find_embedding(model, modules, decoder)
    head = find_head(model, modules)
    embeddings, alike = find_beside(modules, decoder, styles, {embedding, head})
    others = {embedding, *embeddings, *alike}
    norm = find_final_norm(model, modules, decoder, container, others)
    plan = Plan(
        family=family,
        tp=tp,
        sp=sp,
        decoder=decoder,
        layers=layers,
        blocks=tuple(blocks),
        embedding=embedding,
        norm=norm,
        head=head,
        shard_norms=(*norms, norm),
        replicated=(*alike, *find_outside(modules, decoder, {embedding, norm, head})),
        tied=head is not None and modules[head].weight is modules[embedding].weight,
        ep=ep,
        embeddings=embeddings,
        per_token=tuple(per_token),
        dropout=bool(dropout),
        cp=cp,
    )
    check_ep(name, plan, dp_shard)
    check_tp(name, plan)
    check_cp(name, plan, modules, cp)
    return replace(plan, ring=choose_ring(name, plan, modules, exchange or Exchange()))


def _layered_keys(
    name: str,
    styles: Mapping[str, str],
    modules: Modules,
    experts: list[str],
    given: str | None,
) -> tuple[str, dict[str, Kind], list[str]]:
    """The layer container's path, what is below a layer -> our kind, and arguments by token."""
    per_token: list[str] = []
    containers: set[str] = set()
    keys: dict[str, Kind] = {}
    unknown: list[str] = []
    named = {re.sub(r"\.\d+\.", ".*.", path) for path in modules}
    for key, style in styles.items():
        container, layered, below = key.partition(".*.")
        of_experts = style_of_experts(key, experts)
        others: Any = {*_STYLES, *_OF_ARGUMENTS, _OF_PARAMETERS} if layered else _OUTER_STYLES
        if style == "packed_colwise" and key not in named:
            others = ()  # a parameter of experts of another form
        if style != of_experts and (of_experts or style not in others):
            unknown.append(f"{key}: {style}")
        elif layered and not of_experts:
            containers.add(container)
            if style in _OF_ARGUMENTS:
                per_token.append(below)
            elif style == _OF_PARAMETERS:
                found = [m for path, m in modules.items() if re.sub(r"\.\d+\.", ".*.", path) == key]
                owned = {name for m in found for name, p in m._parameters.items() if p is not None}
                keys |= {f"{below}.{name}": "column" for name in sorted(owned)}
            else:
                keys[below] = _STYLES[style]
    if unknown:
        inner, outer = ", ".join(_STYLES), ", ".join(sorted(_OUTER_STYLES))
        experts_styles = ", ".join(
            f"{end or 'the module'}: {s}" for end, s in EXPERTS_STYLES.items()
        )
        raise PlanError(
            f"{name}: the plan uses styles that hf_sp does not carry out",
            where="\n".join(unknown),
            rule="a plan is carried out whole or not at all",
            legal=f"linears and norms in a layer: {inner}\nan argument of the layers: "
            f"{', '.join(_OF_ARGUMENTS)}\nexperts of a form that hf_sp knows: "
            f"{experts_styles}\noutside the layers: {outer}",
        )
    if not containers:
        raise PlanError(
            f"the plan has no layers of {name}"
            if given
            else f"transformers has no layer plan for {name}",
            where=given or f"{name}.tp_plan",
            got=", ".join(styles),
            rule="hf_sp splits what the plan says of a decoder layer's linears: a key names the "
            "stack, one * for the number, and the linear",
            remedy=_EXAMPLE,
        )
    if len(containers) != 1 or not isinstance(modules.get(*containers), nn.ModuleList):
        raise PlanError(
            f"{name}: the plan does not name one stack of decoder layers",
            got=", ".join(sorted(containers)),
            rule="all layered keys share one ModuleList of decoder layers",
        )
    return containers.pop(), keys, per_token


def _arguments(module: nn.Module) -> Collection[str]:
    return inspect.signature(module.forward).parameters


def _norms(modules: Modules, layer: str, blocks: list[Block], named: list[str]) -> list[str]:
    """Modules of a layer that own weights outside its blocks; inside, the blocks claim them all."""
    norms = []
    for path, own in owners(modules, layer):
        block = next((b for b in blocks if inside(path, b.path)), None)
        if block is not None:
            if path == block.path and {f"{path}.{name}" for name in own} <= {*block.of_heads}:
                continue
            claimed = [*block.partial, *block.over_heads, *block.alike]
            claimed += [leaf.path for leaf in block.leaves]
            rows = block.mixer.own if block.mixer else ()
            shown = {one.name for one in rows if one.module == path}
            own = {name: p for name, p in own.items() if name not in shown}
            # experts_block has looked at all weights of a sparse one.
            if block.experts or not own or any(inside(path, one) for one in claimed):
                continue
        elif all(p.dim() <= 1 for p in own.values()) or any(inside(path, key) for key in named):
            norms.append(path)
            continue
        wrong, p = max(own.items(), key=lambda item: item[1].dim())
        raise PlanError(
            "a weight of a decoder layer is claimed by no key of the plan",
            where=f"{path}.{wrong}",
            got=f"shape {tuple(p.shape)}",
            rule="outside the TP blocks only per-feature weights (norms) are understood; inside, "
            "an unclaimed weight would silently get a partial gradient",
            remedy="pass parallelize(..., plan={...}) with a style for it",
        )
    return norms


# That to which hf_sp gives each rank's own masks, and that outside the layers.
_KNOWN_DROPOUT = {"attention_dropout", "classifier_dropout", "classifier_dropout_prob"}


def _drops(model: Any, modules: Modules, container: str) -> dict[str, float]:
    """Dropout in the layers: modules, and calls with a probability from the config."""
    found = {
        path: module.p
        for path, module in modules.items()
        if inside(path, container) and isinstance(module, nn.Dropout) and module.p > 0
    }
    for name, value in model.config.get_text_config().to_dict().items():
        dropout = ("dropout" in name or "pdrop" in name) and name not in _KNOWN_DROPOUT
        if dropout and isinstance(value, float) and value > 0:
            found[f"config.{name}"] = value
    return found


def _refuse_dropout(found: Mapping[str, float]) -> None:
    raise PlanError(
        "a decoder layer drops hidden states at random",
        where="\n".join(found),
        got=", ".join(map(str, found.values())),
        rule="what is dropped has to be one rank's own, or a part of a sum; that is known of "
        + ", ".join(sorted(DROPOUT)),
        legal="0 (attention_dropout is supported)",
        remedy="set it to 0 in the config",
    )
