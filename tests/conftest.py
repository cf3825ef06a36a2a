"""Shared set-up: import path, one thread, ends the rank pools with the session."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

# `harness` is importable from any test, and hf_sp from the checkout, whatever pytest's import mode
# and working directory.
_TESTS = Path(__file__).resolve().parent
for _entry in (str(_TESTS.parent), str(_TESTS)):
    if _entry not in sys.path:
        sys.path.insert(0, _entry)

from harness.pool import close_all, freeze_imports, pool  # noqa: E402 (needs the path above)

# Sums must not depend on how many cores the machine has, and ranks share the cores.
torch.set_num_threads(1)


# Two workers share the files (scripts/test.sh): who gets a long one last works alone at the end.
_LONG = ("recipes/", "adapters/test_trl", "parity/test_cost", "parity/test_compile", "behaviour/")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Put the files that take minutes first."""

    def turn(item):
        path = item.path.relative_to(_TESTS).as_posix()
        return next((i for i, name in enumerate(_LONG) if path.startswith(name)), len(_LONG))

    items.sort(key=turn)


def pytest_runtest_setup():
    """Count and collect only what a test makes."""
    freeze_imports()


@pytest.fixture(scope="session")
def ranks():
    """`ranks(world)`: the pool of that many persistent gloo ranks (see harness/pool.py)."""
    return pool


def pytest_sessionfinish(session, exitstatus):
    """End the ranks before pytest's own teardown, so that no process outlives the run."""
    close_all()
