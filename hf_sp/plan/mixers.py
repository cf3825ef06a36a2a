"""Token mixers that are no softmax attention: what tp divides of them, as data.

A mixer runs over the whole sequence, on a rank's own heads, with transformers' own forward: it is
told how many heads, features and channels it has here. Its short convolution and its numbers by
head are small: they are stored whole, and a rank uses the rows of its heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.known_forms import gated_norm_groups
from hf_sp.plan.outer import Modules, check_linear, class_name
from hf_sp.plan.schema import Block, Kind, Leaf, Mixer, OwnRows, Segments, own_size

_Names = tuple[str, ...]
FACTOR = "ssm_in_multiplier"
"""What a Mamba-2 multiplies its input with, if it does (Falcon-H1)."""


class _Form(NamedTuple):
    """Names of attributes of a mixer, and of its children; numbers of a name are multiplied."""

    heads: str
    shared: str  # groups of heads that share what has it in its name; "" if there are none
    counts: Mapping[str, _Names]  # of heads, features and channels, of which a rank has its part
    packed: Mapping[str, _Names]  # features of each of what is packed in one


_KEYS_AND_VALUES = "key_dim", "key_dim", "value_dim"
# The state's inputs and outputs, which the heads of a group share.
_STATE = "n_groups ssm_state_size", "n_groups ssm_state_size"
_PROJECTED = ("intermediate_size", "intermediate_size", *_STATE, "num_heads")
_FORMS = (
    # Gated DeltaNet: each key head serves the value heads behind it.
    _Form(
        "num_k_heads",
        "",
        {
            **{n: (n,) for n in ("num_k_heads", "num_v_heads", "key_dim", "value_dim")},
            "conv_dim": _KEYS_AND_VALUES,
        },
        {"in_proj_qkv": _KEYS_AND_VALUES, "conv1d": _KEYS_AND_VALUES},
    ),
    # Mamba-2: the gate is the first of what is packed, the time steps are the last.
    _Form(
        "num_heads",
        "n_groups",
        {
            **{n: (n,) for n in ("n_groups", "num_heads", "intermediate_size")},
            "conv_dim": ("intermediate_size", *_STATE),
        },
        {
            "in_proj": _PROJECTED,
            "conv1d": ("intermediate_size", *_STATE),
            # What each of the projected is multiplied with.
            "mup_vector": _PROJECTED,
        },
    ),
)


def mixer_block(modules: Modules, path: str, keys: Mapping[str, Kind]) -> Block | None:
    """The block of a mixer of a known form; None for a block of another kind.

    Raises:
        PlanError: a weight of it is not made of whole heads, or it has something that is not known.
    """
    block = modules[path]
    form = next((f for f in _FORMS if {*f.counts} <= block.__dict__.keys()), None)
    if form is None:
        return None
    if unknown := [name for name in block._buffers if name not in form.packed]:
        raise PlanError(
            "a mixer of the plan has a buffer",
            where=", ".join(f"{path}.{name}" for name in unknown),
            rule="which part of it is of a rank's heads is not known",
        )
    found = _Mixer(block, path, form)
    for name in block._buffers:
        segments = found.segments(form.packed[name])
        found.own.append(OwnRows(path, name, segments, dim=-1))
    for key, kind in keys.items():
        if kind != "partial":
            found.add(modules, key, kind)
    if {leaf.style for leaf in found.leaves} < {"column", "row"}:
        raise PlanError(
            "a mixer of the plan does not pair column with row linears",
            where=path,
            got=", ".join(f"{leaf.path.rpartition('.')[2]}: {leaf.style}" for leaf in found.leaves),
            rule="a TP block gathers before its column and reduce-scatters after its row linears",
        )
    partial = tuple(key for key, kind in keys.items() if kind == "partial")
    return Block(path, tuple(found.leaves), partial, attention=True, mixer=found.mixer())


class _Mixer:
    """A mixer while its keys are looked at."""

    def __init__(self, block: nn.Module, path: str, form: _Form) -> None:
        self.block, self.path, self.form = block, path, form
        self.heads: int = block.__dict__[form.heads]
        self.shared: int = block.__dict__[form.shared] if form.shared else 0
        self.leaves: list[Leaf] = []
        self.own: list[OwnRows] = []
        self.columns: list[tuple[str, Segments]] = []
        self.norms: list[tuple[str, int]] = []
        self.counts = [("", name, self.segments(names)) for name, names in form.counts.items()]

    def mixer(self) -> Mixer:
        """What has been found."""
        own, columns, norms = tuple(self.own), tuple(self.columns), tuple(self.norms)
        factor = FACTOR if FACTOR in self.block.__dict__ else ""
        return Mixer(self.heads, self.shared, tuple(self.counts), own, columns, norms, factor)

    def segments(self, names: _Names) -> Segments:
        """Heads, or groups, and features of each of what has these sizes."""
        found = []
        for one in names:
            size = math.prod(self.block.__dict__[name] for name in one.split())
            count = self.shared if self.form.shared in one.split() else self.heads
            _check_heads(self.path, size, count)
            found.append((count, size // count))
        return tuple(found)

    def add(self, modules: Modules, key: str, kind: Kind) -> None:
        """Take a module or a parameter up, as a key of the plan has it."""
        module, child = modules.get(key), key.removeprefix(f"{self.path}.")
        packed = self.segments(self.form.packed[child]) if child in self.form.packed else None
        if module is None:
            owner, _, name = key.rpartition(".")
            self._own(modules[owner], owner, name, packed)
        elif isinstance(module, nn.Linear):
            self._linear(key, child, module, kind, packed if kind == "packed" else None)
        else:
            for name, p in module._parameters.items():
                if p is not None:
                    self._own(module, key, name, packed)
            if isinstance(module, nn.Conv1d):
                assert packed is not None
                names = ("in_channels", "out_channels", "groups")
                self.counts += [(child, name, packed) for name in names]
            elif module._parameters:
                groups = gated_norm_groups(module, key)
                self.norms.append((child, groups))
                if "n_groups" in module.__dict__:
                    self.counts.append((child, "n_groups", ((groups, 1),)))

    def _linear(
        self, path: str, child: str, module: nn.Linear, kind: Kind, packed: Segments | None
    ) -> None:
        check_linear(path, module)
        shape = module.out_features, module.in_features
        size = shape[kind == "row"]
        segments = packed or _of_heads(path, size, self.heads)
        _check_sum(path, size, segments)
        if kind == "row":
            self.leaves.append(Leaf(path, "row", shape, self.heads))
            return
        self.columns.append((child, segments))
        sizes = tuple(count * width for count, width in segments) if packed else ()
        self.leaves.append(Leaf(path, "packed" if packed else "column", shape, self.heads, sizes))

    def _own(self, module: nn.Module, owner: str, name: str, packed: Segments | None) -> None:
        size = module.get_parameter(name).shape[0]
        segments = packed or _of_heads(f"{owner}.{name}", size, self.heads)
        _check_sum(f"{owner}.{name}", size, segments)
        alone = not isinstance(module, nn.Conv1d) or module.groups == module.in_channels == size
        if not alone:
            raise PlanError(
                "a convolution of a mixer mixes channels",
                where=owner,
                got=class_name(module),
                rule="each channel has a filter of its own",
            )
        self.own.append(OwnRows(owner, name, segments))


def _of_heads(path: str, size: int, heads: int) -> Segments:
    _check_heads(path, size, heads)
    return ((heads, size // heads),)


def _check_heads(path: str, size: int, heads: int) -> None:
    if heads and size % heads == 0:
        return
    _refuse(path, size, f"a multiple of {heads} heads")


def _check_sum(path: str, size: int, segments: Segments) -> None:
    if size != own_size(segments, 1):
        _refuse(path, size, " + ".join(str(count * width) for count, width in segments))


def _refuse(path: str, size: int, legal: str) -> Any:
    raise PlanError(
        "a weight of a mixer is not made of whole heads",
        where=path,
        got=f"{size} features",
        rule="packed_colwise packs keys and values, of so many features each; anything else "
        "is made of whole heads",
        legal=legal,
    )
