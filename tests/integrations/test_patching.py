"""A patched function is called as the original can be called."""

from __future__ import annotations

import types

from hf_sp.patching import Patches


def _module():
    module = types.ModuleType("somewhere")
    module.swap = lambda model, state, name="default": ("original", model, state, name)
    table = Patches(lambda model: model == "ours")

    @table.on(module, "swap")
    def patch(original, model, *args, **kwargs):
        return ("patched", *original(model, *args, **kwargs)[1:])

    table.apply()
    table.apply()
    return module


def test_the_instance_comes_by_position_or_by_name():
    swap = _module().swap
    for who, kind in [("ours", "patched"), ("theirs", "original")]:
        expected = (kind, who, {}, "one")
        assert swap(who, {}, "one") == expected
        assert swap(who, state={}, name="one") == expected
        assert swap(model=who, state={}, name="one") == expected
        assert swap(name="one", state={}, model=who) == expected
