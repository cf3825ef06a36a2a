"""Private names of peft and trl are what the integrations were written against."""

from __future__ import annotations

import inspect

import pytest
from integrations.test_names import check

from hf_sp.adapters import peft_patches
from hf_sp.adapters.names import NAMES
from hf_sp.integrations import trl_patches

TABLES = [peft_patches.PATCHES, peft_patches.LAYER_PATCHES, trl_patches.patches()]


@pytest.mark.parametrize("name", NAMES, ids=lambda n: n.path)
def test_name_is_as_it_was(name):
    check(name)


@pytest.mark.parametrize("table", TABLES)
def test_every_patched_name_is_listed(table):
    listed = [name.path.replace(":", ".") for name in NAMES]
    for owner, name, patch in table.entries:
        assert patch.__doc__
        path = f"{owner.__name__}.{name}"
        full = path if inspect.ismodule(owner) else f"{owner.__module__}.{path}"
        assert full in listed
