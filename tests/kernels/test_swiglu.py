"""SwiGLU: torch and interpreted kernels against float64, autograd and each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_sp.errors import ShapeError
from hf_sp.kernels import launch as dispatch
from hf_sp.kernels import swiglu, swiglu_triton
from hf_sp.kernels.reference import GELU_TANH, SILU
from hf_sp.kernels.swiglu import swiglu_backward, swiglu_forward
from tests.kernels.exact import U, assert_within, like, tiny

BOTH = {"swiglu_forward_kernel", "swiglu_backward_kernel"}
PATHS = pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])


def random_pair(shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(shape, generator=g)).to(dtype).requires_grad_() for _ in range(2)]


def check_swiglu(gate, up, dz, triton, gating=SILU):
    """Forward, backward and the recomputed product against float64; returns what was found."""
    gate.requires_grad_()
    up.requires_grad_()
    how = {"triton": triton, "gating": gating}
    z = swiglu(gate, up, **how)
    assert type(z.grad_fn).__name__ == "SwiGluBackward"
    kept = dz.clone()
    dgate, dup = torch.autograd.grad(z, [gate, up], dz)
    assert torch.equal(dz, kept), "the incoming gradient was written to"
    gate, up, z = gate.detach(), up.detach(), z.detach()
    found = swiglu_backward(dz, gate, up, product=True, **how)
    assert all(torch.equal(a, b) for a, b in zip(found, (dgate, dup, z), strict=True))
    assert torch.equal(swiglu_forward(gate, up, **how), z)
    assert swiglu_backward(dz, gate, up, product=False, **how)[2] is None

    # float32 noise: exp of v is wrong by |v| roundings of its argument, plus a dozen operations.
    u, least = U[gate.dtype], tiny(gate.dtype)
    g, v, d = gate.double(), up.double(), dz.double()
    inner, rise, error = g, 1.0, 0.0
    if gating == GELU_TANH:
        inner = (8 / math.pi) ** 0.5 * (g + 0.044715 * g**3)
        rise = (8 / math.pi) ** 0.5 * (1 + 0.134145 * g**2)
        # torch has 1 + tanh, which cancels. Its argument has four roundings more.
        error = 4 * (g * v).abs() * U[torch.float32]
    noise = ((1 if gating == SILU else 5) * inner.abs() + 16) * U[torch.float32]
    sigmoid = torch.sigmoid(inner)
    act = g * sigmoid
    # The activation is rounded, then the product.
    bound = (act * v).abs() * (2 * u + u * u + noise) + error + least * (1 + v.abs())
    assert_within(z, act * v, bound, "z")
    dup_true = d * act
    assert_within(dup, dup_true, dup_true.abs() * (u + noise) + least, "dup")
    slope = sigmoid * (1 + g * (1 - sigmoid) * rise)
    dgate_true = d * v * slope
    # The slope is a sum that may cancel: noise is relative to its terms.
    size = (d * v).abs() * sigmoid * (1 + g.abs() * (1 - sigmoid) * rise)
    assert_within(dgate, dgate_true, dgate_true.abs() * u + size * noise + least, "dgate")
    return z, dgate, dup


@PATHS
@pytest.mark.parametrize("dtype", list(U))
def test_gelu_against_float64(dtype, triton, ran):
    gate, up = random_pair((3, 5, 96), dtype)
    check_swiglu(gate, up, like(gate), triton, GELU_TANH)
    assert set(ran()) == (BOTH if triton else set())


@pytest.mark.parametrize("gating", [GELU_TANH, ("clamped", 1.7, 2.0)], ids=lambda g: g[0])
def test_other_gates_agree_with_autograd(gating, ran):
    """In float64, of the text of transformers; gpt-oss's at its edges too."""
    gate, up = (x.double().requires_grad_() for x in random_pair((7, 64), torch.bfloat16))
    with torch.no_grad():
        gate[0], up[0], up[1] = 2.0, 2.0, -2.0
    if gating == GELU_TANH:
        theirs = F.gelu(gate, approximate="tanh") * up
    else:
        g, v = gate.clamp(min=None, max=2.0), up.clamp(min=-2.0, max=2.0)
        theirs = (v + 1) * (g * torch.sigmoid(g * 1.7))
    ours = swiglu(gate, up, gating=gating)
    assert torch.equal(ours, theirs)
    dz = like(gate)
    pairs = (torch.autograd.grad(z, [gate, up], dz) for z in (ours, theirs))
    for a, b in zip(*pairs, strict=True):
        assert (a - b).norm() / b.norm() < 1e-14
    assert not ran()


@PATHS
@pytest.mark.parametrize("dtype", list(U))
@pytest.mark.parametrize("shape", [(1,), (1, 7), (3, 5, 96), (2, 1500)], ids=str)
def test_against_float64(shape, dtype, triton, ran):
    gate, up = random_pair(shape, dtype)
    first = check_swiglu(gate, up, like(gate), triton)
    assert set(ran()) == (BOTH if triton else set())
    second = check_swiglu(gate, up, like(gate), triton)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bits_of_transformers(dtype, ran):
    gate, up = random_pair((64, 512), dtype)
    wanted = F.silu(gate) * up
    assert torch.equal(swiglu(gate, up, triton=False), wanted)
    # exp and the division differ in float32's last bits; that meets a tie of bf16 (f16) as rarely
    # as its noise is narrow: 8 spacings of float32 at most of the 2^16 (2^13) in one of the dtype.
    allowed = 8 * 2 * U[torch.float32] / U[dtype]
    assert (swiglu(gate, up) != wanted).float().mean().item() <= allowed
    assert ran() == {"swiglu_forward_kernel": 1}


@PATHS
def test_backward_is_closer_to_float64_than_autograd(triton):
    gate, up = random_pair((64, 512), torch.bfloat16)
    dz = like(gate)
    theirs = torch.autograd.grad(F.silu(gate) * up, [gate, up], dz)
    ours = torch.autograd.grad(swiglu(gate, up, triton=triton), [gate, up], dz)
    wide = [t.detach().double().requires_grad_() for t in (gate, up)]
    truth = torch.autograd.grad(F.silu(wide[0]) * wide[1], wide, dz.double())
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert (mine.double() - true).norm() < (other.double() - true).norm()


def test_float32_and_float64_agree_with_autograd(ran):
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        gate, up = random_pair((7, 64), dtype)
        dz = like(gate)
        theirs = torch.autograd.grad(F.silu(gate) * up, [gate, up], dz)
        ours = torch.autograd.grad(swiglu(gate, up, triton=False), [gate, up], dz)
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() / b.norm() < limit
    assert torch.equal(swiglu(gate, up), F.silu(gate) * up)  # float64 is torch's in any case
    assert not ran()


def test_what_is_saved():
    gate, up = random_pair((4, 32), torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        swiglu(gate, up)
    assert [t.data_ptr() for t in saved] == [gate.data_ptr(), up.data_ptr()]


def halves():
    fused = (3 * torch.randn(3, 5, 192)).bfloat16()
    return fused.chunk(2, dim=-1)


VIEWS = {
    "halves of one buffer": halves,
    "sequence-major": lambda: [torch.randn(5, 3, 96).bfloat16().transpose(0, 1) for _ in range(2)],
    "one of each": lambda: [
        torch.randn(5, 3, 96).bfloat16().transpose(0, 1),
        torch.randn(3, 5, 96).bfloat16(),
    ],
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_read_where_they_lie(name, ran, monkeypatch):
    torch.manual_seed(0)
    gate, up = VIEWS[name]()
    pointers = []
    launch = dispatch.launch

    def spy(kernel, grid, *args, **kwargs):
        pointers.append({a.data_ptr() for a in args if isinstance(a, torch.Tensor)})
        return launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(dispatch, "launch", spy)
    z, dgate, dup = check_swiglu(gate, up, torch.randn(3, 5, 96).bfloat16(), True)
    assert all({gate.data_ptr(), up.data_ptr()} <= launched for launched in pointers), "copied"
    assert set(ran()) == BOTH
    layout = torch.empty_like(gate).stride()
    assert z.stride() == dgate.stride() == dup.stride() == layout


def test_sequence_major_memory_stays_so_in_torch():
    gate, up = VIEWS["sequence-major"]()
    for t in (
        swiglu_forward(gate, up, triton=False),
        *swiglu_backward(gate, gate, up, triton=False)[:2],
    ):
        assert t.stride() == gate.stride()


def test_other_strides_are_copied(ran):
    gate = torch.randn(64, 6).bfloat16().t()
    up = torch.randn(2, 6, 128).bfloat16()[0, :, ::2]
    check_swiglu(gate, up, like(gate).expand(6, 64), True)
    gate = torch.randn(4, 8, 8, 32).bfloat16()[:, ::2, ::2]
    check_swiglu(gate, like(gate), torch.ones(1).bfloat16().expand(gate.shape), True)
    assert set(ran()) == BOTH


@PATHS
def test_ends_of_the_range(triton):
    ends = [-3e38, -1e4, -100.0, -88.0, -20.0, 0.0, 20.0, 100.0, 1e4, 3e38]
    for dtype in (torch.float32, torch.bfloat16):
        gate = torch.tensor(ends, dtype=dtype)
        one = torch.ones_like(gate)
        z = swiglu_forward(gate, one, triton=triton)
        dgate, dup, _ = swiglu_backward(one, gate, one, triton=triton)
        wanted = F.silu(gate.double())
        assert_within(z, wanted, wanted.abs() * 2 * U[dtype] + 1e-30, "z")
        assert_within(dup, wanted, wanted.abs() * 2 * U[dtype] + 1e-30, "dup")
        slope = torch.where(gate > 0, 1.0, 0.0) + torch.where(gate == 0, 0.5, 0.0)
        assert_within(dgate, slope.double(), torch.full_like(slope, 1e-6).double(), "dgate")


@PATHS
def test_nan_and_inf_stay_where_they_are(triton):
    gate = torch.tensor([1.0, float("nan"), 2.0, float("inf"), 3.0])
    up = torch.tensor([1.0, 1.0, float("inf"), 1.0, 3.0])
    z = swiglu_forward(gate, up, triton=triton)
    assert torch.equal(z.isfinite(), torch.tensor([True, False, False, False, True]))
    grads = swiglu_backward(torch.ones(5), gate, up, triton=triton)[:2]
    assert all(t[[0, 4]].isfinite().all() for t in grads)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 8)])
def test_nothing_to_do(shape, ran):
    gate, up = random_pair(shape, torch.bfloat16)
    z = swiglu(gate, up)
    z.sum().backward()
    assert z.shape == gate.grad.shape == shape
    assert not ran()


def test_mixed_dtypes_promote_in_torch(ran):
    gate = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    up = torch.randn(4, 8, requires_grad=True)
    z = swiglu(gate, up)
    assert torch.equal(z, F.silu(gate) * up)
    z.sum().backward()
    assert (gate.grad.dtype, up.grad.dtype) == (torch.bfloat16, torch.float32)
    assert not ran()


def test_frozen_sides_and_no_gradient():
    gate, up = random_pair((4, 8), torch.float32)
    swiglu(gate, up.detach()).sum().backward()
    assert gate.grad is not None
    swiglu(gate.detach(), up).sum().backward()
    assert up.grad is not None
    with torch.no_grad():
        assert not swiglu(gate, up).requires_grad


def test_fullgraph_compile_is_the_plain_expression(ran):
    gate, up = random_pair((4, 32), torch.bfloat16)
    compiled = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    z = compiled(gate, up)
    assert torch.equal(z, F.silu(gate) * up)
    z.sum().backward()
    assert not ran()


def test_fake_tensors(ran):
    with FakeTensorMode():
        gate = torch.empty(2, 3, 8, requires_grad=True)
        swiglu(gate, gate).sum().backward()
        assert gate.grad.shape == gate.shape
    assert not ran()


def test_other_settings_give_the_same_bits():
    from hf_sp.kernels.table import LaunchConfig

    gate, up = random_pair((3, 96), torch.bfloat16)
    gate, up = gate.detach(), up.detach()
    config = LaunchConfig(warps=2, block=64)
    assert torch.equal(swiglu_triton.swiglu(gate, up, config=config), swiglu_forward(gate, up))
    ours = swiglu_triton.swiglu_backward(gate, gate, up, config=config)[:2]
    wanted = swiglu_backward(gate, gate, up)[:2]
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize(
    ("gate", "up", "words"),
    [
        (torch.ones(2, 3), torch.ones(3), "never broadcasts"),
        (torch.ones(2), torch.ones(2, device="meta"), "one device"),
        (torch.ones(2, dtype=torch.long), torch.ones(2), "floating"),
    ],
)
def test_refusals(gate, up, words):
    with pytest.raises(ShapeError, match=words):
        swiglu(gate, up)
