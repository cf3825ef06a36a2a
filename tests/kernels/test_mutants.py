"""Faults put into the kernels and the reference, one at a time: the checks must notice each.

None may write outside its tensors: the interpreter would write there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import hf_sp.kernels
from hf_sp.kernels import launch as dispatch
from hf_sp.kernels import norm, rms_norm, swiglu
from hf_sp.kernels.reference import GELU_TANH
from tests.kernels import exact
from tests.kernels.exact import check_norm, like, random_case
from tests.kernels.hugging_face import NORMS
from tests.kernels.hugging_face import norm as their_norm
from tests.kernels.test_norm_triton import fused_qkv
from tests.kernels.test_swiglu import check_swiglu, halves, random_pair

FOLDER = Path(hf_sp.kernels.__file__).parent


def mutant(name, old, new, tmp_path):
    """The module with one piece of its source replaced."""
    source = (FOLDER / f"{name}.py").read_text()
    assert old in source, "the mutant's place is gone"
    path = tmp_path / f"mutant_{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probe_norm(triton):
    """The checks of the other files, on few inputs: all that a fault could touch."""
    torch.manual_seed(0)
    for casting, eps in (("llama", 1e-6), ("gemma", 0.1)):
        case = random_case((37, 96), casting=casting)
        case.eps = eps
        found = check_norm(case, triton=triton)
        if triton:
            wanted = check_norm(case, triton=False)
            error = (found[2] - wanted[2]).norm() / wanted[2].norm()
            assert error < exact.U[torch.bfloat16] / 8, "dw"
    case = random_case((1, 128))
    case.x = fused_qkv(4, 2)
    check_norm(case, triton=triton)
    for name in NORMS:
        module, form = their_norm(name, torch.randn(96).bfloat16())
        x = torch.randn(8, 96).bfloat16()
        wanted = module(x)
        y = rms_norm(x, module.weight, 1e-6, triton=triton, **form)
        assert (y == wanted).float().mean().item() > 0.995, "bits"


def probe_swiglu(triton):
    torch.manual_seed(0)
    gate, up = halves()
    check_swiglu(gate, up, like(gate), triton)
    gate, up = random_pair((8, 300), torch.bfloat16)
    check_swiglu(gate, up, like(gate), triton)
    check_swiglu(gate, up, like(gate), triton, GELU_TANH)
    wanted = F.silu(gate) * up
    assert (swiglu(gate, up, triton=triton) == wanted).float().mean().item() > 0.995, "bits"


NORM = [
    ("tl.num_programs(0), num_stages", "tl.num_programs(0) + 1, num_stages"),
    ("tl.range(pid,", "tl.range(0,"),
    ("        y = y.to(x.dtype).to(tl.float32)", "        pass"),
    ("keep_dims=True) / N + EPS", "keep_dims=True) / BLOCK_N + EPS"),
    ("keep_dims=True) / N))", "keep_dims=True) / BLOCK_N))"),
    ("/ N + EPS)", "/ N)"),
    ("        w = w + OFFSET", "        pass"),
    ("dw += dy32 * xhat.to(x.dtype).to(tl.float32)", "dw += dy32 * xhat"),
    ("DW + pid.to(tl.int64) * N", "DW"),
    ("rstd * (g - xhat *", "rstd * (g + xhat *"),
    ("g = dy32 * w", "g = dy32"),
    ("(row % inner)", "(row % 1)"),
    ("(row // inner)", "(row // inner // 2)"),
]
SWIGLU = [
    ("(1.0 + tl.exp(-v))).to(g.dtype).to(tl.float32)", "(1.0 + tl.exp(-v)))"),
    ("act * (1.0 - sigmoid)", "act * sigmoid"),
    ("slope = slope * (1.5957691216057308", "slope = slope * (1.5"),
    ("1.5957691216057308 * (g32 +", "1.5 * (g32 +"),
    ("(dz32 * act)", "(dz32 * g32)"),
    ("dz32 * u32 * (", "dz32 * ("),
    ("z = (act.to(g.dtype).to(tl.float32) * u32)", "z = (act * u32)"),
    ("row // inner", "row // inner // 2"),
    ("rows, n = 1, rows * n", "rows, n = 1, n"),
]
REFERENCE = [
    ("    y = y.to(x.dtype)\n", ""),
    ("(offset + weight.to(torch.float32) if cast", "(weight if cast"),
    ("(offset + gain if offset else gain)", "gain"),
    ("g - xhat * (g * xhat).mean", "g - (g * xhat).mean"),
    ("g - xhat * (g * xhat)", "g + xhat * (g * xhat)"),
    ("dw.sum(tuple", "dw.mean(tuple"),
]
REFERENCE_SWIGLU = [
    ("act * (1 - sigmoid)", "act * sigmoid"),
    ("dup = dz * act", "dup = dz * sigmoid"),
    ("1 + 3 * _GELU_CUBE", "1 + _GELU_CUBE"),
]


def test_the_probes_pass():
    for triton in (True, False):
        probe_norm(triton)
        probe_swiglu(triton)


@pytest.mark.parametrize(("old", "new"), NORM, ids=range(len(NORM)))
def test_norm_kernels(old, new, tmp_path, monkeypatch):
    module = mutant("norm_triton", old, new, tmp_path)
    monkeypatch.setattr(dispatch, "_module", lambda name: module)
    with pytest.raises(AssertionError):
        probe_norm(True)


@pytest.mark.parametrize(("old", "new"), SWIGLU, ids=range(len(SWIGLU)))
def test_swiglu_kernels(old, new, tmp_path, monkeypatch):
    module = mutant("swiglu_triton", old, new, tmp_path)
    monkeypatch.setattr(dispatch, "_module", lambda name: module)
    with pytest.raises(AssertionError):
        probe_swiglu(True)


@pytest.mark.parametrize(("old", "new"), REFERENCE, ids=range(len(REFERENCE)))
def test_norm_reference(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(norm, "reference", mutant("reference", old, new, tmp_path))
    with pytest.raises(AssertionError):
        probe_norm(False)


@pytest.mark.parametrize(("old", "new"), REFERENCE_SWIGLU, ids=range(len(REFERENCE_SWIGLU)))
def test_swiglu_reference(old, new, tmp_path, monkeypatch):
    import sys

    module = sys.modules["hf_sp.kernels.swiglu"]
    monkeypatch.setattr(module, "reference", mutant("reference", old, new, tmp_path))
    with pytest.raises(AssertionError):
        probe_swiglu(False)


@pytest.mark.parametrize("kernels", ["norm_kernels", "swiglu_kernels"])
def test_a_silent_fallback(kernels, monkeypatch, ran):
    monkeypatch.setattr(dispatch, kernels, lambda *args, **kwargs: None)
    (probe_norm if kernels == "norm_kernels" else probe_swiglu)(True)
    assert not ran(), "what the other tests look at"
