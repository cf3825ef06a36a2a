"""Every table of patches in the package, found and not listed: a new one cannot be forgotten."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import hf_sp.adapters
import hf_sp.integrations
from hf_sp.patching import Patches


def tables():
    """``module.name`` of each table, also of those that a function makes once."""
    found = {}
    for package in (hf_sp.integrations, hf_sp.adapters):
        for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                if getattr(value, "__module__", module.__name__) not in (
                    module.__name__,
                    Patches.__module__,
                ):
                    continue
                if inspect.isfunction(value) or hasattr(value, "cache_info"):
                    made = inspect.signature(value).return_annotation in ("Patches", Patches)
                    value = value() if made else None
                if isinstance(value, Patches):
                    found[f"{module.__name__}.{name}"] = value
    return found


def entries():
    """The patches by name: (table, owner, attribute, patch)."""
    return {
        f"{owner.__name__}.{name}": (table, owner, name, patch)
        for table in {id(t): t for t in tables().values()}.values()
        for owner, name, patch in table.entries
    }
