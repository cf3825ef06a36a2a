"""The operator forms: opcheck, whole graphs, and the same results as the functions."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from hf_sp.kernels import ops, rms_norm, swiglu
from tests.kernels.exact import like, random_case

# torch 2.14's opcheck reads `.grad` of tensors that it has cloned; it hides the warning from the
# screen only.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

PATHS = pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])


@pytest.fixture
def path(triton, monkeypatch):
    if not triton:
        monkeypatch.delenv("TRITON_INTERPRET")


def inputs(weight="same", dtype=torch.bfloat16):
    case = random_case((3, 4, 32), dtype, weight=weight, residual=True)
    # Another layout than the contiguous one that fakes promise.
    x, residual = (t.transpose(0, 1).requires_grad_() for t in (case.x, case.residual))
    return x, residual, case.weight


@PATHS
@pytest.mark.parametrize("weight", ["same", torch.float32, None])
def test_opcheck_norm(path, weight):
    x, residual, w = inputs(weight)
    w = None if w is None else w.requires_grad_()
    opcheck(ops.rms_norm, (x, w, 1e-6, 0.0, "llama"))
    opcheck(ops.add_rms_norm, (x, residual, w, 1e-6, 0.0, "gpt_oss"))
    x, w = x.detach(), None if w is None else w.detach()
    y, s, rstd = ops.add_rms_norm(x, residual.detach(), w, 1e-6, 1.0, "gemma")
    opcheck(ops.rms_norm_backward, (y, None, s, rstd, w, 1e-6, 1.0, "gemma"))
    opcheck(ops.rms_norm_backward, (y, s, s, rstd, w, 1e-6, 1.0, "gemma"))


@PATHS
def test_opcheck_swiglu(path):
    gate, up, _ = inputs()
    opcheck(ops.swiglu, (gate, up))
    opcheck(ops.swiglu_backward, (up.detach(), gate.detach(), up.detach()))


@PATHS
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_same_as_the_functions(path, compiled, triton, ran):
    def call(x, residual, w):
        y, s, _ = torch.ops.hf_sp.add_rms_norm(x, residual, w, 1e-6, 0.0, "llama")
        again, _ = torch.ops.hf_sp.rms_norm(y, w, 1e-6, 1.0, "gemma")
        return torch.ops.hf_sp.swiglu(again, s), s

    def plain(x, residual, w):
        y, s = rms_norm(x, w, 1e-6, residual=residual)
        return swiglu(rms_norm(y, w, 1e-6, casting="gemma", offset=1.0), s), s

    if compiled:
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, residual, w = (t.detach().contiguous().requires_grad_() for t in inputs())
    results = []
    for function in (call, plain):
        found = function(x, residual, w)
        grads = torch.autograd.grad(found, [x, residual, w], [like(t, 3) for t in found])
        results.append((*found, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # Three forwards and three backwards, of each of the two.
    assert sum(ran().values()) == (12 if triton else 0)


def test_float64(monkeypatch):
    x, residual, w = inputs(dtype=torch.float64)
    w.requires_grad_()
    opcheck(ops.add_rms_norm, (x, residual, w, 1e-6, 0.0, "llama"))
