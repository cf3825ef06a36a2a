"""The interpreter's repairs, and the private names of triton that they stand on."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_sp.kernels import launch as dispatch
from tests.kernels import interpreter as ours
from tests.kernels.bare import BARE

ROOT = Path(__file__).resolve().parents[2]


def test_bfloat16_is_rounded_as_torch_does(ran):
    toy = pytest.importorskip("tests.kernels.toy")
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=g).to(torch.int32)
    ties = (torch.arange(256, dtype=torch.int32) << 15) + 0x3F800000  # every second one a tie
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3.4e38])
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special])
    y = torch.empty_like(x, dtype=torch.bfloat16)
    back = torch.empty_like(x)
    dispatch.launch(toy.copy_kernel, (1,), x, y, back, x.numel(), BLOCK=8192)
    wanted = x.bfloat16()
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y[~y.isnan()], wanted[~y.isnan()])
    assert torch.equal(back[~y.isnan()], y[~y.isnan()].float())
    assert ran() == {"copy_kernel": 1}


def test_that_it_is_the_repair_that_rounds(monkeypatch):
    """Once triton rounds by itself, fault 1 can go from the interpreter here."""
    toy = pytest.importorskip("tests.kernels.toy")
    x = torch.randn(4096)
    y, back = torch.empty_like(x, dtype=torch.bfloat16), torch.empty_like(x)
    monkeypatch.setattr(ours, "_bfloat16_cast", lambda *_: None)
    dispatch.launch(toy.copy_kernel, (1,), x, y, back, x.numel(), BLOCK=4096)
    assert not torch.equal(y, x.bfloat16())


def test_loop_bounds_known_at_run_time(ran):
    toy = pytest.importorskip("tests.kernels.toy")
    x, y = torch.randn(7, 16), torch.empty(16)
    dispatch.launch(toy.column_sum_kernel, (1,), x, y, 7, BLOCK=16)
    torch.testing.assert_close(y, x.sum(0))


def test_nothing_is_left_behind():
    import triton.language as tl

    toy = pytest.importorskip("tests.kernels.toy")
    spaces = (tl, tl.core, tl.standard, tl.math, tl.tensor, tl.dtype)
    # What interpreting adds to a module's globals for the functions rewritten is another matter.
    first, y = torch.randn(2, 16), torch.empty(16)
    dispatch.launch(toy.column_sum_kernel, (1,), first, y, 2, BLOCK=16)
    before = [dict(vars(space)) for space in spaces]
    dispatch.launch(toy.column_sum_kernel, (1,), first, y, 2, BLOCK=16)
    assert [dict(vars(space)) for space in spaces] == before
    with pytest.raises(Exception, match="BLOCK"):
        dispatch.launch(toy.column_sum_kernel, (1,), first, y, 2)
    assert [dict(vars(space)) for space in spaces] == before


SCRIPT = (
    BARE
    + """
import os
mode = sys.argv[1]
if mode == "set":
    os.environ["TRITON_INTERPRET"] = "1"
import torch
from hf_sp.kernels import launch as dispatch, norm_triton
from tests.kernels import interpreter
dispatch.interpreter = interpreter.launch
x, w = torch.randn(5, 64).bfloat16(), torch.ones(64).bfloat16()
y, rstd = norm_triton.rms_norm(x, w, 1e-6, 0.0, "llama")
assert torch.equal(y, norm_triton.rms_norm(x, w, 1e-6, 0.0, "llama")[0])
wanted = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).bfloat16()
assert torch.equal(y, wanted)
if mode == "not set":
    # Compiled kernels still compile in a process that has interpreted them.
    sys.argv = ["sm_90"]
    from tests.kernels import sm_90
    launched = []
    dispatch.launch = lambda kernel, grid, *a, **k: launched.append((kernel, a, k))
    norm_triton.rms_norm(x, w, 1e-6, 0.0, "llama")
    assert "cubin" in sm_90.compile_launch(*launched[0]).asm
print("done")
"""
)


@pytest.mark.parametrize("mode", ["set", "not set"])
def test_kernels_decorated_for_either(mode, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout == "done\n", run.stderr


def test_the_private_names():
    import triton.language as tl
    from triton.runtime import interpreter, jit

    builder = interpreter.InterpreterBuilder
    ours._repair()
    assert list(inspect.signature(builder.cast_impl).parameters) == ["self", "src", "dst_type"]
    parameters = ["self", "src", "dst_type", "rounding_mode"]
    assert list(inspect.signature(builder.create_fp_to_fp).parameters) == parameters
    assert list(inspect.signature(interpreter._patch_lang_tensor).parameters) == ["tensor", "scope"]
    assert interpreter.TensorHandle(np.zeros(1, np.float32), tl.float32).data.shape == (1,)
    assert inspect.isclass(jit.JITFunction)
    assert callable(interpreter.InterpretedFunction)


def test_the_package_uses_none_of_them():
    pattern = re.compile(r"triton\.(runtime|compiler|backends|_)|InterpretedFunction|JITFunction")
    folder = ROOT / "hf_sp"
    assert not [path.name for path in folder.rglob("*.py") if pattern.search(path.read_text())]
