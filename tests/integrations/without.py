"""Rank functions: a probe with its patch, and without it."""

from __future__ import annotations

import functools
import inspect
import os

from integrations import (  # noqa: F401  (they fill ROWS)
    rows_accelerate,
    rows_files,
    rows_peft,
    rows_processes,
    rows_ranks,
    rows_torch,
    rows_trainer,
    rows_trl,
)
from integrations.jobs import scene_of
from integrations.rows import ROWS
from integrations.scene import reset_accelerate
from integrations.tables import entries


def outcome(probe, scene):
    """The value of a probe, or its exception, as data."""
    reset_accelerate()
    try:
        return {"value": probe(scene)}
    except Exception as error:  # compared by its type and text
        return {"raised": type(error).__name__, "text": str(error)}
    finally:
        # Ranks of which one has failed meet again.
        scene.everywhere(None)
        reset_accelerate()


def on_rank(out):
    """Per patch the outcome with it and without it."""
    with scene_of("tp", out) as scene:
        return {name: both(name, scene) for name in sorted(entries()) if name in ROWS}


def both(name, scene):
    """The outcomes of a row with its patch and without it."""
    # What waits for a rank that does not come says so soon.
    os.environ["HF_SP_SAVE_TIMEOUT"] = "3"
    table, owner, attribute, _ = entries()[name]
    table.apply()
    probe = ROWS[name].probe
    right = outcome(probe, scene)
    patched = inspect.getattr_static(owner, attribute)
    if isinstance(patched, property):
        setattr(owner, attribute, property(_bare(patched.fget.__hf_sp_original__)))
    else:
        setattr(owner, attribute, _bare(patched.__hf_sp_original__))
    try:
        wrong = outcome(probe, scene)
    finally:
        setattr(owner, attribute, patched)
    return {"right": right, "wrong": wrong}


def _bare(original):
    """The original, marked as patched: every ``parallelize`` puts missing patches in place."""

    @functools.wraps(original)
    def method(*args, **kwargs):
        return original(*args, **kwargs)

    method.__hf_sp_original__ = original
    return method
