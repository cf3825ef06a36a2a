"""Private names of other packages are what the integrations were written against."""

from __future__ import annotations

import importlib
import inspect

import pytest

from hf_sp.integrations.private_names import NAMES
from hf_sp.patching import Name, Patches
from integrations.tables import tables

# PEFT's and TRL's are in tests/adapters.
TABLES = {n: t for n, t in tables().items() if "peft" not in n and "trl" not in n}


def found(name: Name):
    module, path = name.path.split(":")
    value = importlib.import_module(module)
    for part in path.split("."):
        value = inspect.getattr_static(value, part)
    value = value.fget if isinstance(value, property) else value
    return getattr(value, "__hf_sp_original__", value)


def check(name: Name) -> None:
    """Signature and lines are those that the integrations were written against."""
    value = found(name)
    if name.signature is not None:
        parameters = [
            p.replace(annotation=inspect.Parameter.empty)
            for p in inspect.signature(value).parameters.values()
        ]
        assert str(inspect.Signature(parameters)) == name.signature
    if name.lines:
        source = inspect.getsource(value)
        assert [line for line in name.lines if line not in source] == []


@pytest.mark.parametrize("name", NAMES, ids=lambda n: n.path)
def test_name_is_as_it_was(name):
    check(name)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_patched_method_is_listed(table):
    listed = [name.path.split(":")[1] for name in NAMES]
    patched = [
        name if inspect.ismodule(owner) else f"{owner.__name__}.{name}"
        for owner, name, _ in table.entries
    ]
    assert patched
    assert [p for p in patched if p not in listed] == []


def test_every_patch_says_what_it_is_for():
    silent = [p.__name__ for table in TABLES.values() for _, _, p in table.entries if not p.__doc__]
    assert silent == []


class Thing:
    def act(self, x, *, y=1):
        """Docstring."""
        return x + y


def test_patches_act_on_active_instances_once_and_keep_the_signature():
    table = Patches(lambda thing: getattr(thing, "ours", False))

    @table.on(Thing, "act")
    def doubled(original, self, x, *, y=1):
        return 2 * original(self, x, y=y)

    signature = inspect.signature(Thing.act)
    table.apply()
    first = Thing.act
    table.apply()
    assert Thing.act is first
    assert inspect.signature(Thing.act) == signature
    assert Thing.act.__doc__ == "Docstring."
    plain, ours = Thing(), Thing()
    ours.ours = True
    assert (plain.act(1, y=2), ours.act(1, y=2)) == (3, 6)
