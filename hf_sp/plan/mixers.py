"""Token mixers that are no softmax attention: what tp divides of them, as data.

A mixer runs over the whole sequence, on a rank's own heads, with transformers' own forward: it is
told how many heads, features and channels it has here. Its short convolution and its numbers by
head are small: they are stored whole, and a rank uses the rows of its heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.outer import Modules, check_linear, class_name
from hf_sp.plan.schema import Block, Kind, Leaf, Mixer, OwnRows


class _Form(NamedTuple):
    """Names of attributes of a mixer, and of its children."""

    heads: str  # groups of heads that belong together
    counts: tuple[str, ...]  # numbers of heads, features and channels, of which a rank has its part
    # Of what is packed in one: features of each, numbers of which are multiplied.
    packed: Mapping[str, tuple[str, ...]]


_KEYS_AND_VALUES = "key_dim", "key_dim", "value_dim"
# The state's inputs and outputs, which the heads of a group share.
_SHARED = "n_groups ssm_state_size", "n_groups ssm_state_size"
_FORMS = (
    # Gated DeltaNet: each key head serves the value heads behind it.
    _Form(
        "num_k_heads",
        ("num_k_heads", "num_v_heads", "key_dim", "value_dim", "conv_dim"),
        {"in_proj_qkv": _KEYS_AND_VALUES, "conv1d": _KEYS_AND_VALUES},
    ),
    # Mamba-2: the gate is the first of what is packed, the time steps are the last.
    _Form(
        "n_groups",
        ("n_groups", "num_heads", "intermediate_size", "conv_dim"),
        {
            "in_proj": ("intermediate_size", "intermediate_size", *_SHARED, "num_heads"),
            "conv1d": ("intermediate_size", *_SHARED),
        },
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
    if block._buffers:
        raise PlanError(
            "a mixer of the plan has a buffer",
            where=", ".join(f"{path}.{name}" for name in block._buffers),
            rule="which part of it is of a rank's heads is not known",
        )
    heads = block.__dict__[form.heads]
    packed = {
        f"{path}.{child}": tuple(
            math.prod(block.__dict__[name] for name in one.split()) for one in names
        )
        for child, names in form.packed.items()
    }
    leaves: list[Leaf] = []
    own: list[OwnRows] = []
    for key, kind in keys.items():
        module = modules.get(key)
        segments = packed.get(key, (heads,)) if kind == "packed" else (heads,)
        if kind == "partial":
            continue
        if module is None:
            owner, _, name = key.rpartition(".")
            own.append(_own(modules[owner], owner, name, segments))
        elif not isinstance(module, nn.Linear):
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
