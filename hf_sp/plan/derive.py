"""Hugging Face plan strings to a ``Plan``.

Owns the reading of ``model.tp_plan`` and of the module tree; refuses a model that it does not
understand whole. Must not know torch.distributed; runs on meta tensors; changes nothing.

A plan key such as ``model.layers.*.self_attn.q_proj`` names a linear inside a decoder layer. The
layer's child that owns it (``self_attn``) is the TP block. Nothing here is written per family:
what a family needs beyond its own plan strings would be an entry in ``_STYLES``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.check import Divisor, check_divisible
from hf_sp.plan.experts import check_ep, experts_block, is_experts, without_experts
from hf_sp.plan.outer import find_embedding, find_final_norm, find_head, find_outside
from hf_sp.plan.schema import Block, Leaf, Plan, Style

# HF's strings -> ours. "partial": replicated weight used on local heads.
_STYLES: dict[str, str] = {
    "colwise": "column",
    "rowwise": "row",
    "replicated_with_grad_allreduce": "partial",
}
# Styles of modules outside the layers; how these are split is read off the modules themselves.
_OUTER_STYLES = {"colwise_gather_output", "colwise", "embedding_rowwise"}
_LAYERED = re.compile(r"^(?P<container>[^*]+)\.\*\.(?P<rest>.+)$")


def derive_plan(
    model: nn.Module,
    tp: int,
    sp: bool,
    styles: Mapping[str, str] | None = None,
    ep: int = 1,
    dp_shard: int = 1,
) -> Plan:
    """Read a model's plan and check that hf_sp can carry it out whole at this ``tp``.

    Args:
        model: a transformers model; may be on meta.
        tp: tensor parallel degree.
        sp: whether hidden states are sharded along the sequence.
        styles: plan strings to use instead of ``model.tp_plan``.
        ep: expert parallel degree.
        dp_shard: data parallel ranks that ep may span beside tp.

    Raises:
        PlanError: no plan, an unknown style, a key that matches nothing, a weight that no key
            claims, a layer of another shape than the plan needs, sizes that tp cannot divide, or
            an ep that the model or this release does not have.
    """
    if styles is None:
        styles = getattr(model, "tp_plan", None)
    name = type(model).__name__
    if not styles:
        raise PlanError(
            f"{name} has no tensor parallel plan",
            where=f"{name}.tp_plan",
            got=repr(styles),
            rule="hf_sp derives the split of each layer from the model's own plan strings",
            remedy="use a model whose config defines base_model_tp_plan, or pass "
            "parallelize(..., plan={'model.layers.*.self_attn.q_proj': 'colwise', ...})",
        )
    modules = dict(model.named_modules())
    container, rests = _layered_keys(name, without_experts(name, styles, modules), modules)
    decoder = container.rpartition(".")[0]
    stack = cast(nn.ModuleList, modules[container])
    layers = tuple(f"{container}.{i}" for i in range(len(stack)))
    if len(set(map(id, stack))) != len(stack):
        raise PlanError(
            "one decoder layer stands in several places",
            where=container,
            rule="each layer is sharded once",
        )
    divisors: list[Divisor] = []
    blocks: list[Block] = []
    norms: list[str] = []
    matched: set[str] = set()
    for layer in layers:
        found = {rest: style for rest, style in rests.items() if f"{layer}.{rest}" in modules}
        matched |= found.keys()
        sparse = _sparse_blocks(modules, layer)
        usual = {r: style for r, style in found.items() if r.partition(".")[0] not in sparse}
        blocks += _blocks_of_layer(model, modules, layer, usual, tp, divisors)
        for child, experts in sparse.items():
            # In a model without a dense layer, its keys are read for shared experts only.
            keys = [rest for rest in rests if rest.startswith(child + ".")]
            matched |= set(keys)
            dense = {rest.removeprefix(child + "."): rests[rest] for rest in keys}
            path = f"{layer}.{child}"
            blocks.append(experts_block(modules, path, experts, dense, ep, divisors))
        norms += _norms_of_layer(modules, layer, blocks)
    missing = sorted(rests.keys() - matched)
    if missing:
        raise PlanError(
            f"{name}: plan keys match no module",
            where="\n".join(f"{container}.*.{rest}" for rest in missing),
            rule="every key of the plan must match, or a weight would silently stay whole",
        )
    _refuse_dropout(model, modules, container)
    embedding = find_embedding(model, modules, decoder)
    head = find_head(model, modules)
    norm = find_final_norm(model, modules, decoder, container, embedding)
    replicated = find_outside(modules, decoder, {embedding, norm, head})
    check_ep(name, tp, sp, ep, blocks, dp_shard)
    check_divisible(name, tp, divisors)
    tied = head is not None and modules[head].weight is modules[embedding].weight
    return Plan(
        family=getattr(model.config, "model_type", name),
        tp=tp,
        sp=sp,
        decoder=decoder,
        layers=layers,
        blocks=tuple(blocks),
        embedding=embedding,
        norm=norm,
        head=head,
        shard_norms=(*norms, norm),
        replicated=replicated,
        tied=tied,
        ep=ep,
    )


def _sparse_blocks(modules: dict[str, nn.Module], layer: str) -> dict[str, str]:
    """A layer's children that own experts -> the path of these."""
    found: dict[str, str] = {}
    for path, module in modules.items():
        if not path.startswith(layer + ".") or not is_experts(module):
            continue
        child, _, rest = path.removeprefix(layer + ".").partition(".")
        if not rest or "." in rest or child in found:
            raise PlanError(
                "experts do not stand where a block of a layer has its experts",
                where=path,
                rule="one set of experts, a child of a decoder layer's child (mlp.experts)",
            )
        found[child] = path
    return found


def _layered_keys(
    name: str, styles: Mapping[str, str], modules: dict[str, nn.Module]
) -> tuple[str, dict[str, str]]:
    """The layer container's path, and what is below a layer -> our style."""
    containers: set[str] = set()
    rests: dict[str, str] = {}
    unknown: list[str] = []
    for key, style in styles.items():
        match = _LAYERED.match(key)
        if match is None:
            if style not in _OUTER_STYLES:
                unknown.append(f"{key}: {style}")
            elif key not in modules:
                raise PlanError(
                    f"{name}: a plan key matches no module",
                    where=key,
                    rule="every key of the plan must match",
                )
        elif style not in _STYLES:
            unknown.append(f"{key}: {style}")
        else:
            containers.add(match["container"])
            rests[match["rest"]] = _STYLES[style]
    if unknown:
        raise PlanError(
            f"{name}: the plan uses styles that hf_sp does not carry out",
            where="\n".join(unknown),
            rule="a plan is carried out whole or not at all",
            legal=", ".join(sorted({*_STYLES, *_OUTER_STYLES})),
        )
    if len(containers) != 1 or not isinstance(modules.get(next(iter(containers))), nn.ModuleList):
        raise PlanError(
            f"{name}: the plan does not name one stack of decoder layers",
            got=", ".join(sorted(containers)) or "no key with '.*.'",
            rule="all layered keys share one ModuleList of decoder layers",
        )
    return containers.pop(), rests


def _blocks_of_layer(
    model: nn.Module,
    modules: dict[str, nn.Module],
    layer: str,
    found: dict[str, str],
    tp: int,
    divisors: list[Divisor],
) -> list[Block]:
    children: dict[str, list[str]] = {}
    for rest in found:
        children.setdefault(rest.partition(".")[0], []).append(rest)
    blocks = []
    for child, keys in children.items():
        path = f"{layer}.{child}"
        leaves, partial = [], []
        heads = _Heads.of(model, modules[path])
        for rest in keys:
            leaf_path, style = f"{layer}.{rest}", found[rest]
            if style == "partial":
                partial.append(leaf_path)
                continue
            module = modules[leaf_path]
            # Subclasses (quantised, adapters) keep their weights in forms that cannot be sliced.
            if type(module) is not nn.Linear or {*module._parameters} != {"weight", "bias"}:
                raise PlanError(
                    "a linear of the plan is not a plain torch.nn.Linear",
                    where=leaf_path,
                    got=f"{type(module).__module__}.{type(module).__qualname__}",
                    rule="hf_sp shards plain linears; quantised or wrapped ones are not sliced",
                    remedy="parallelize the model before it is quantised or given adapters",
                )
            leaves.append(heads.leaf(leaf_path, style, module, tp, divisors))
        kinds = {leaf.style for leaf in leaves}
        if not kinds & {"column", "column_replicated"} or "row" not in kinds:
            raise PlanError(
                "a block of the plan does not pair column with row linears",
                where=path,
                got=", ".join(f"{leaf.path.rpartition('.')[2]}: {leaf.style}" for leaf in leaves),
                rule="a TP block gathers once before its column linears and reduce-scatters once "
                "after its row linear; it must own both",
            )
        _check_claimed(modules, path, {leaf.path for leaf in leaves} | set(partial))
        blocks.append(Block(path, tuple(leaves), tuple(partial), attention=bool(heads)))
    return blocks


class _Heads:
    """Head counts of one attention block; falsy for other blocks."""

    def __init__(self, head_dim: int, query: int, key_value: int) -> None:
        self.head_dim, self.query, self.key_value = head_dim, query, key_value

    def __bool__(self) -> bool:
        return self.head_dim > 0

    @classmethod
    def of(cls, model: nn.Module, block: nn.Module) -> _Heads:
        head_dim = getattr(block, "head_dim", 0)
        config: Any = getattr(block, "config", model.config)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
        query = getattr(config, "num_attention_heads", 0) if head_dim else 0
        return cls(head_dim, query, getattr(config, "num_key_value_heads", None) or query)

    def leaf(
        self, path: str, style: str, module: nn.Linear, tp: int, divisors: list[Divisor]
    ) -> Leaf:
        shape = (module.out_features, module.in_features)
        split = shape[0] if style == "column" else shape[1]
        if not self:
            divisors.append(Divisor("features", split, path))
            return Leaf(path, _style(style), shape)
        heads = split // self.head_dim
        if heads * self.head_dim != split or heads not in (self.query, self.key_value):
            raise PlanError(
                "an attention projection is not made of whole heads",
                where=path,
                got=f"{split} features with head_dim {self.head_dim}",
                rule=f"its split dim must hold {self.query} query or {self.key_value} key/value "
                "heads",
            )
        # With as many kv as query heads, all projections are split alike.
        if style == "column" and heads == self.key_value and heads != self.query:
            divisors.append(Divisor("num_key_value_heads", heads, path, replicable=True))
            if heads < tp and tp % heads == 0:
                return Leaf(path, "column_replicated", shape, heads)
        else:
            divisors.append(Divisor("num_attention_heads", heads, path))
        return Leaf(path, _style(style), shape, heads)


def _style(style: str) -> Style:
    return "column" if style == "column" else "row"


def _check_claimed(modules: dict[str, nn.Module], block: str, claimed: set[str]) -> None:
    """Every parameter of a TP block must belong to a module that the plan names."""
    for path, module in modules.items():
        inside = path == block or path.startswith(block + ".")
        owner = any(path == c or path.startswith(c + ".") for c in claimed)
        own = [n for n, p in module.named_parameters(recurse=False) if p is not None]
        if inside and own and not owner:
            raise PlanError(
                "a parameter inside a TP block is claimed by no key of the plan",
                where=f"{path}.{own[0]}",
                rule="inside a block each rank computes on its own part, so that an unclaimed "
                "weight would silently get a partial gradient",
                remedy="pass parallelize(..., plan={...}) with a style for it",
            )


def _norms_of_layer(modules: dict[str, nn.Module], layer: str, blocks: list[Block]) -> list[str]:
    """Modules of a layer outside its blocks; each must act on single tokens, as a norm does."""
    inside = tuple(b.path for b in blocks if b.path.startswith(layer + "."))
    norms = []
    for path, module in modules.items():
        if not path.startswith(layer) or path.startswith(tuple(p + "." for p in inside)):
            continue
        if path in inside or not (path == layer or path.startswith(layer + ".")):
            continue
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        wide = [n for n, p in own.items() if p.dim() > 1]
        if wide:
            raise PlanError(
                "a weight of a decoder layer is claimed by no key of the plan",
                where=f"{path}.{wide[0]}",
                got=f"shape {tuple(own[wide[0]].shape)}",
                rule="outside the TP blocks only per-feature weights (norms) are understood",
            )
        norms.append(path)
    return norms


# Dropout that hf_sp gives its own masks on each rank, and dropout outside the layers.
_KNOWN_DROPOUT = {"attention_dropout", "classifier_dropout", "classifier_dropout_prob"}


def _refuse_dropout(model: Any, modules: dict[str, nn.Module], container: str) -> None:
    """Other dropout in the layers would drop the same places of each shard, or of partial sums.

    It may be a module, or a call in a forward with a probability from the config.
    """
    found = {
        path: module.p
        for path, module in modules.items()
        if path.startswith(container + ".") and isinstance(module, nn.Dropout) and module.p > 0
    }
    for name, value in model.config.get_text_config().to_dict().items():
        dropout = ("dropout" in name or "pdrop" in name) and name not in _KNOWN_DROPOUT
        if dropout and isinstance(value, float) and value > 0:
            found[f"config.{name}"] = value
    if found:
        raise PlanError(
            "a decoder layer drops hidden states at random",
            where="\n".join(found),
            got=", ".join(map(str, found.values())),
            rule="on sequence shards and partial sums the masks would not be the model's",
            legal="0 (attention_dropout is supported)",
            remedy="set it to 0 in the config",
        )
