"""The TP blocks that hf_sp knows: an MLP, and an attention by heads (linear ones: ``mixers``).

What a block does with its input is read off the signature of its forward: one tensor is looked at
token by token, and masks or positions beside it mean attention. Anything else is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.known_forms import norm_form
from hf_sp.plan.mixers import mixer_block
from hf_sp.plan.outer import Modules, check_linear, class_name, owners
from hf_sp.plan.schema import Block, Kind, Leaf, Style

# What a block that attends over the sequence is given besides its input.
_GIVEN_TO_ATTENTION = {"attention_mask", "position_embeddings", "position_ids"}


def tp_block(
    model: nn.Module, modules: Modules, path: str, keys: Mapping[str, Kind], tp: int
) -> Block:
    """The TP block of the modules that the plan names."""
    mixer = mixer_block(modules, path, keys)
    if mixer is not None:
        return mixer
    if "row" not in keys.values():
        raise _unpaired(path, keys.items())
    heads = _heads(model, modules, path, keys)
    bare = {key: kind for key, kind in keys.items() if key not in modules}
    _check_bare(modules, path, bare, heads)
    keys = {key: kind for key, kind in keys.items() if key not in bare}
    partial = tuple(key for key, kind in keys.items() if kind == "partial")
    named = [key for key, kind in keys.items() if kind == "alike"]
    alike = tuple(path for key in named for path, _ in owners(modules, key))
    wide = [key for key, kind in keys.items() if kind == "column" and _is_norm(modules[key])]
    leaves = tuple(
        _leaf(key, modules[key], kind, heads, tp)
        for key, kind in keys.items()
        if key not in (*partial, *named, *wide)
    )
    styles = {leaf.style for leaf in leaves} - {"replicated"}
    if "row" not in styles or len(styles) == 1:
        raise _unpaired(path, ((leaf.path, leaf.style) for leaf in leaves))
    hidden, width = next(leaf.shape for leaf in leaves if leaf.style == "row")
    for leaf in leaves:
        made = {"column": width, "packed": 2 * width}.get(leaf.style)
        if heads is None and made is not None and leaf.shape[0] != made:
            raise PlanError(
                "a column linear of an MLP does not make what its row linear reads",
                where=leaf.path,
                got=f"{leaf.shape[0]} features",
                rule="colwise makes one tensor of the row linear's width; packed_colwise packs two "
                "linears, gate and up, in halves",
                legal=str(made),
            )
    inner = {leaf.shape[1] for leaf in leaves if leaf.style == "column"} - {hidden}
    for leaf in leaves:
        if leaf.style == "replicated" and not (heads and inner and min(inner) <= leaf.shape[0]):
            raise PlanError(
                "a low-rank projection of the plan is read by no column linear of an attention",
                where=leaf.path,
                got=f"{leaf.shape[0]} features; column linears read {sorted(inner) or hidden}",
                rule="what every rank computes alike goes through a linear that makes own heads",
            )
    for key in wide:
        size = modules[key].get_parameter("weight").shape[0]
        sizes = {leaf.shape[leaf.style == "row"] for leaf in leaves if leaf.style != "replicated"}
        if size not in sizes:
            raise PlanError(
                "a norm of the plan is not one over all heads or features",
                where=key,
                got=f"{size} features",
                rule="its weight is split as what a column linear makes or a row linear reads",
                legal=", ".join(map(str, sorted(sizes))),
            )
    return Block(
        path,
        leaves,
        partial,
        over_heads=tuple(wide),
        alike=alike,
        of_heads=tuple(bare),
        attention=heads is not None,
    )


def _unpaired(path: str, kinds: Iterable[tuple[str, str]]) -> PlanError:
    return PlanError(
        "a block of the plan does not pair column with row linears",
        where=path,
        got=", ".join(f"{key.rpartition('.')[2]}: {kind}" for key, kind in kinds),
        rule="a TP block gathers before its column and reduce-scatters after its row linears",
    )


def _check_bare(
    modules: Modules, path: str, bare: Mapping[str, Kind], heads: _Heads | None
) -> None:
    """Refuse parameters of the block itself that are not a number for each query head."""
    for key, kind in bare.items():
        owner, _, name = key.rpartition(".")
        shape = tuple(modules[owner].get_parameter(name).shape)
        if owner != path or heads is None or kind != "column" or shape != (heads.query,):
            raise PlanError(
                "a parameter of the plan is not one number for each head of an attention",
                where=key,
                got=f"{kind}, shape {shape}",
                rule="a key names a linear, a norm, or an attention's own parameter by heads",
                legal=f"colwise, of shape ({heads.query},)" if heads else "",
            )


def _is_norm(module: nn.Module) -> bool:
    return not isinstance(module, nn.Linear) and norm_form(module) is not None


class _Heads(NamedTuple):
    """Of an attention block: sizes of a head and of its values, numbers of query and k/v heads.

    ``latent``: keys and values are made of a low-rank projection, one of each for each query head.
    """

    dim: int
    value: int
    query: int
    key_value: int
    latent: bool


def _heads(model: Any, modules: Modules, path: str, keys: Mapping[str, Kind]) -> _Heads | None:
    """The heads of a block that attends; None for one that treats each token by itself.

    Raises:
        PlanError: the block is neither, or its heads could not be told.
    """
    block: Any = modules[path]
    given = [
        p.name
        for p in inspect.signature(block.forward).parameters.values()
        if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if len(given) == 1:
        return None
    config = getattr(block, "config", model.config).get_text_config()
    row = next((key for key, kind in keys.items() if kind == "row"), "")
    width = getattr(modules.get(row), "in_features", 0)
    dim = getattr(block, "head_dim", None)
    # Where layers differ, transformers' config raises, and each attention knows its own.
    query = _number(config, "num_attention_heads", width // dim if dim else 0)
    if not _GIVEN_TO_ATTENTION & {*given} or not query or not width or width % query:
        raise PlanError(
            "a block of the plan is neither an MLP nor an attention that hf_sp knows",
            where=path,
            got=f"{class_name(block)}, given {', '.join(given)}; {query} heads, {width} features",
            rule="an MLP is given one tensor; an attention is given masks or positions too, and "
            "its row linear reads whole heads",
        )
    latent = "replicated" in keys.values()
    dim = dim or width // query
    # Layers may differ in it, where the config has one number.
    groups = getattr(block, "num_key_value_groups", 0)
    key_value = query // groups if groups else _number(config, "num_key_value_heads", 0) or query
    value = dim if latent else getattr(block, "v_head_dim", dim)
    return _Heads(dim, value, query, query if latent else key_value, latent)


def _number(config: Any, name: str, otherwise: int) -> int:
    """A number of the config, or another one where each layer has its own."""
    try:
        return getattr(config, name, 0)
    except RuntimeError:
        return otherwise


def _leaf(path: str, module: nn.Module, kind: Kind, heads: _Heads | None, tp: int) -> Leaf:
    check_linear(path, module)
    assert isinstance(module, nn.Linear)
    shape = module.out_features, module.in_features
    parts = shape[1] if kind == "row" else shape[0]
    if kind == "replicated":
        return Leaf(path, "replicated", shape)
    if heads is None:
        if kind == "packed":
            return Leaf(path, "packed", shape, segments=(1, 1))
        return Leaf(path, "row" if kind == "row" else "column", shape)
    dim, value, query, key_value, latent = heads
    # Latent attention has heads of other sizes for keys and values.
    count, rest = (query, parts % query) if latent else divmod(parts, dim)
    of_values = {parts // value} & {query, key_value} if parts % value == 0 else set()
    if value != dim and of_values:
        # Only values are read by the row linear; others could be whole heads of either size.
        known = {count} & {query, key_value} if kind != "row" and not rest else set()
        count, rest = next(iter(of_values)), len(known - of_values)
    segments: tuple[int, ...] = ()
    if kind == "column" and parts == query and count not in (query, key_value):
        count, rest = query, 0  # a gate, a number for each head
    if kind == "packed" and count == query + 2 * key_value:
        segments, count = (query, key_value, key_value), key_value
    elif kind == "column_by_head" and not count % query:
        count = query
    if rest or count not in (query, key_value) or (kind == "packed") != bool(segments):
        raise PlanError(
            "an attention projection is not made of whole heads",
            where=path,
            got=f"{parts} features with head_dim {dim}",
            rule=f"its split dim must hold {query} query or {key_value} key/value heads",
        )
    # With as many kv as query heads, all projections are split alike.
    fewer = kind in ("column", "packed") and count == key_value != query
    style: Style = "row" if kind == "row" else "packed" if segments else "column"
    if fewer and count < tp and tp % count == 0:
        style = "column_replicated"
    return Leaf(path, style, shape, count, segments)
