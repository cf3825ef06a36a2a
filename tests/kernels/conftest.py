"""Kernels run in Triton's interpreter here, repaired, whatever TRITON_INTERPRET says."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from pathlib import Path

import pytest

from hf_sp.kernels import launch as dispatch
from tests.kernels import interpreter


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
    """Kernels run on the CPU, but for tests that run on a GPU."""
    on_gpu = request.node.get_closest_marker("gpu")
    monkeypatch.setattr(dispatch, "interpreter", None if on_gpu else interpreter.launch)


@pytest.fixture
def ran():
    """`ran()`: launches since the test began, so that torch cannot answer for a kernel unseen."""
    before = Counter(dispatch.launches)
    return lambda: dispatch.launches - before
