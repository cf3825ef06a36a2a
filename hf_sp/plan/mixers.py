"""Token mixers that are no softmax attention: what tp divides of them, as data.

A mixer runs over the whole sequence, on a rank's own heads, with transformers' own forward: it is
told how many heads, features and channels it has here. Its short convolution and its numbers by
head are small: they are stored whole, and a rank uses the rows of its heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.outer import Modules, check_linear, class_name
from hf_sp.plan.schema import Block, Kind, Leaf, Mixer, OwnRows


class _Form(NamedTuple):
    """Names of attributes of a mixer."""

    heads: str  # groups of heads that belong together
    counts: tuple[str, ...]  # numbers of heads, features and channels, of which a rank has its part
    packed: tuple[str, ...]  # of what is packed in one: features of each


# Gated DeltaNet: each key head serves the value heads behind it.
_FORMS = (
    _Form(
        "num_k_heads",
        ("num_k_heads", "num_v_heads", "key_dim", "value_dim", "conv_dim"),
        ("key_dim", "key_dim", "value_dim"),
    ),
)


def mixer_block(modules: Modules, path: str, keys: Mapping[str, Kind]) -> Block | None:
    """The block of a mixer of a known form; None for a block of another kind.

    Raises:
        PlanError: a weight of it is not made of whole heads.
    """
    block = modules[path]
    form = next((f for f in _FORMS if {*f.counts} <= block.__dict__.keys()), None)
    if form is None:
        return None
    heads = block.__dict__[form.heads]
    packed = tuple(block.__dict__[name] for name in form.packed)
    leaves: list[Leaf] = []
    own: list[OwnRows] = []
    for key, kind in keys.items():
        module = modules.get(key)
        segments = packed if kind == "packed" else (heads,)
        if kind == "partial":
            continue
        if module is None:
            owner, _, name = key.rpartition(".")
            own.append(_own(modules[owner], owner, name, segments))
        elif type(module) is nn.Conv1d:
            names = [name for name, p in module._parameters.items() if p is not None]
            own += [_own(module, key, name, segments) for name in names]
        else:
            leaves.append(_leaf(key, module, kind, heads, segments))
    if {leaf.style for leaf in leaves} < {"column", "row"}:
        raise PlanError(
            "a mixer of the plan does not pair column with row linears",
            where=path,
            got=", ".join(f"{leaf.path.rpartition('.')[2]}: {leaf.style}" for leaf in leaves),
            rule="a TP block gathers before its column and reduce-scatters after its row linears",
        )
    partial = tuple(key for key, kind in keys.items() if kind == "partial")
    mixer = Mixer(heads, form.counts, tuple(own))
    return Block(path, tuple(leaves), partial, attention=True, mixer=mixer)


def _leaf(path: str, module: nn.Module, kind: Kind, heads: int, segments: tuple[int, ...]) -> Leaf:
    check_linear(path, module)
    assert isinstance(module, nn.Linear)
    shape = module.out_features, module.in_features
    if kind == "row":
        _check_rows(path, shape[1], (heads,))
        return Leaf(path, "row", shape, heads)
    _check_rows(path, shape[0], segments)
    if kind == "packed":
        return Leaf(path, "packed", shape, heads, segments)
    return Leaf(path, "column", shape, heads)


def _own(module: nn.Module, owner: str, name: str, segments: tuple[int, ...]) -> OwnRows:
    size = module.get_parameter(name).shape[0]
    _check_rows(f"{owner}.{name}", size, segments)
    alone = not isinstance(module, nn.Conv1d) or module.groups == module.in_channels == size
    if not alone:
        raise PlanError(
            "a convolution of a mixer mixes channels",
            where=owner,
            got=class_name(module),
            rule="each channel has a filter of its own",
        )
    return OwnRows(owner, name, size, segments)


def _check_rows(path: str, size: int, segments: tuple[int, ...]) -> None:
    wrong = size != sum(segments) if len(segments) > 1 else size % segments[0]
    if wrong:
        raise PlanError(
            "a weight of a mixer is not made of whole heads",
            where=path,
            got=f"{size} features",
            rule="packed_colwise packs keys and values, of so many features each; anything else "
            "is made of whole heads",
            legal=f"{' + '.join(map(str, segments))}, or multiples of as many heads",
        )
