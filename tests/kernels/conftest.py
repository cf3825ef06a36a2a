"""Kernels run in Triton's interpreter here, and only here: the variable is read at each launch."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from pathlib import Path

import pytest

from hf_sp.kernels import launch as dispatch


@pytest.fixture(scope="session")
def decorated():
    """Kernels decorated for the compiler, so that tests on a GPU can share the process."""
    pytest.importorskip("triton")
    before = os.environ.pop("TRITON_INTERPRET", None)
    for path in Path(dispatch.__file__).parent.glob("*_triton.py"):
        importlib.import_module(f"hf_sp.kernels.{path.stem}")
    if before is not None:
        os.environ["TRITON_INTERPRET"] = before


@pytest.fixture(autouse=True)
def interpreted(request, monkeypatch, decorated):
    """TRITON_INTERPRET=1, but for tests that run on a GPU."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def ran():
    """`ran()`: launches since the test began, so that torch cannot answer for a kernel unseen."""
    before = Counter(dispatch.launches)
    return lambda: dispatch.launches - before
