"""RMSNorm in torch operations: transformers' bits, float64 truth, any tensor, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.device_mesh import init_device_mesh

from hf_sp.errors import ConfigError, ShapeError
from hf_sp.kernels import launch as dispatch
from hf_sp.kernels import rms_norm, swiglu
from hf_sp.kernels.norm import rms_norm_backward, rms_norm_forward
from tests.kernels.exact import U, check_norm, like, norm_gradients, random_case
from tests.kernels.hugging_face import NORMS, norm


@pytest.fixture(autouse=True)
def torch_only(interpreted, monkeypatch, ran):
    """As on a CPU without the variable: nothing here may run a kernel."""
    monkeypatch.setattr(dispatch, "interpreter", None)
    yield
    assert not ran()


def gradients(call, inputs, dy):
    y = call(*inputs)
    return (y, *torch.autograd.grad(y, inputs, dy))


def both(name, dtype, weight=None, n=96):
    """`(their output and gradients, ours)` on the same inputs."""
    torch.manual_seed(0)
    module, form = norm(name, (1 + 0.3 * torch.randn(n)).to(weight or dtype))
    x = torch.randn(3, 7, n, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(module(x.detach()))
    inputs = [x, module.weight]
    theirs = gradients(lambda x, w: module(x), inputs, dy)
    ours = gradients(lambda x, w: rms_norm(x, w, 1e-6, **form), inputs, dy)
    return theirs, ours, (inputs, dy, form)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_has_the_bits_of_transformers(name, dtype):
    for weight in (None, torch.float32):
        theirs, ours, _ = both(name, dtype, weight)
        assert theirs[0].dtype == ours[0].dtype
        assert torch.equal(theirs[0], ours[0])


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("weight", [torch.float64, torch.float32])
def test_float64_gradients_have_the_bits_of_transformers(name, weight):
    theirs, ours, _ = both(name, torch.float64, weight)
    assert all(torch.equal(a, b) for a, b in zip(theirs[1:], ours[1:], strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_float32_gradients_agree_with_autograd(name):
    theirs, ours, _ = both(name, torch.float32)
    # Both are a few float32 roundings from the truth, in another order.
    for a, b in zip(theirs[1:], ours[1:], strict=True):
        assert (a - b).norm() / a.norm() < 1e-6


@pytest.mark.parametrize("name", NORMS)
def test_bf16_gradients_are_closer_to_float64(name):
    theirs, ours, (inputs, dy, form) = both(name, torch.bfloat16)
    case = random_case((1, 96))
    case.x, case.weight = (t.detach() for t in inputs)
    case.casting, case.offset = form["casting"], form["offset"]
    dx, dw, *_ = norm_gradients(case, dy)
    for mine, other, truth in zip(ours[1:], theirs[1:], (dx, dw), strict=True):
        error = (mine.double() - truth).norm() / truth.norm()
        assert error <= 1.001 * (other.double() - truth).norm() / truth.norm()
        assert error < U[torch.bfloat16]


@pytest.mark.parametrize("casting", ["llama", "gemma", "gpt_oss"])
@pytest.mark.parametrize("dtype", list(U))
def test_against_float64(casting, dtype):
    check_norm(random_case((5, 7, 33), dtype, casting))


def test_weight_gradient_is_not_rounded():
    """Ranks sum their parts before the weight's dtype rounds them."""
    case = random_case((9, 64), casting="gemma")
    dtypes = {torch.bfloat16: torch.float32, torch.float64: torch.float64}
    for dtype, wanted in dtypes.items():
        x, w = case.x.to(dtype), case.weight.to(dtype)
        y, rstd = rms_norm_forward(x, w, 1e-6, **case.form)
        _, dw = rms_norm_backward(like(y), x, rstd, w, 1e-6, need_dx=False, **case.form)
        assert dw.dtype == wanted


def test_what_is_saved():
    case = random_case((4, 5, 64))
    case.x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(case.x, case.weight, 1e-6)
    assert [tuple(t.shape) for t in saved] == [(4, 5, 64), (4, 5), (64,)]
    assert saved[0].data_ptr() == case.x.data_ptr()
    assert saved[1].dtype == torch.float32
    assert saved[2] is case.weight


@pytest.mark.parametrize("call", [lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: swiglu(x, x * w)])
def test_it_cannot_be_differentiated_twice(call):
    case = random_case((4, 64), torch.float32)
    x = case.x.requires_grad_()
    # The incoming gradient requires none: torch's own once_differentiable would say nothing.
    (dx,) = torch.autograd.grad(call(x, case.weight).sum(), x, create_graph=True)
    with pytest.raises(ConfigError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("make", ["fake", "meta"])
def test_tensors_without_values(make):
    def run(device):
        x = torch.empty(2, 3, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        w = torch.empty(64, device=device, requires_grad=True)
        y = rms_norm(x, w, 1e-6)
        y.sum().backward()
        assert (y.dtype, x.grad.dtype, w.grad.dtype) == (
            torch.float32,
            torch.bfloat16,
            torch.float32,
        )
        assert x.grad.shape == x.shape

    if make == "meta":
        run("meta")
    else:
        with FakeTensorMode():
            run("cpu")


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensor(one_rank):
    case = random_case((4, 6, 64), torch.float32)
    x = DTensor.from_local(case.x, one_rank, [Shard(1)]).requires_grad_()
    w = DTensor.from_local(case.weight, one_rank, [Replicate()]).requires_grad_()
    y = rms_norm(x, w, 1e-6)
    assert y.placements == (Shard(1),)
    y.sum().backward()
    plain = case.x.requires_grad_()
    wanted = rms_norm(plain, case.weight, 1e-6)
    assert torch.equal(y.to_local(), wanted)
    wanted.sum().backward()
    assert torch.equal(x.grad.to_local(), plain.grad)
    assert w.grad.full_tensor().shape == (64,)


def test_fullgraph_compile_has_the_bits_of_eager():
    case = random_case((5, 64))
    inputs = [case.x.requires_grad_(), case.weight.requires_grad_()]

    def call(x, w):
        return rms_norm(x, w, 1e-6)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    theirs, ours = (gradients(f, inputs, like(case.x, 1)) for f in (compiled, call))
    assert torch.equal(theirs[0], ours[0])
    # Autograd's own backward there: each of its handful of bf16 roundings is u at most.
    for a, b in zip(theirs[1:], ours[1:], strict=True):
        assert (a - b).float().norm() / b.float().norm() < 4 * U[torch.bfloat16]


X = torch.randn(4, 8)
W = torch.ones(8)


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"casting": "fp32"}, ConfigError, "llama, gemma"),
        ({"offset": 1.0}, ConfigError, "no offset"),
        ({"eps": -1.0}, ConfigError, ">= 0"),
        ({"eps": float("nan")}, ConfigError, ">= 0"),
        ({"x": torch.ones(4, 8, dtype=torch.long)}, ShapeError, "floating"),
        ({"x": torch.ones(())}, ShapeError, "rows"),
        ({"weight": torch.ones(4)}, ShapeError, r"\[8\] on cpu"),
        ({"weight": torch.ones(1)}, ShapeError, "last dimension"),
        ({"weight": torch.ones(8, device="meta")}, ShapeError, "device"),
    ],
)
def test_refusals(kwargs, error, words):
    arguments = {"x": X, "weight": W, "eps": 1e-6} | kwargs
    with pytest.raises(error, match=words) as caught:
        rms_norm(arguments.pop("x"), arguments.pop("weight"), arguments.pop("eps"), **arguments)
    assert "where:" in str(caught.value)
    assert "got:" in str(caught.value)
