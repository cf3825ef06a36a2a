"""RMSNorm in torch operations: transformers' bits, float64 truth, any tensor, `out`, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.device_mesh import init_device_mesh

from hf_sp.errors import ConfigError, ShapeError
from hf_sp.kernels import rms_norm, swiglu
from hf_sp.kernels.norm import rms_norm_forward
from tests.kernels.exact import U, check_norm, like, norm_gradients, random_case
from tests.kernels.hugging_face import NORMS, norm


@pytest.fixture(autouse=True)
def torch_only(interpreted, monkeypatch, ran):
    """As on a CPU without the variable: nothing here may run a kernel."""
    monkeypatch.delenv("TRITON_INTERPRET")
    yield
    assert not ran()


def gradients(call, inputs, grads):
    outputs = call(*inputs)
    return outputs, torch.autograd.grad(outputs, inputs, grads)


def both(name, dtype, weight=None, n=96):
    """`(their outputs and gradients, ours)` of add and norm, on the same inputs."""
    torch.manual_seed(0)
    module, form = norm(name, (1 + 0.3 * torch.randn(n)).to(weight or dtype))
    x, residual = (torch.randn(3, 7, n, dtype=dtype, requires_grad=True) for _ in range(2))
    y = module(x.detach())
    grads = [torch.randn_like(y), torch.randn_like(x)]

    def theirs(x, residual, w):
        s = residual + x
        return module(s), s

    def ours(x, residual, w):
        return rms_norm(x, w, 1e-6, residual=residual, **form)

    inputs = [x, residual, module.weight]
    return gradients(theirs, inputs, grads), gradients(ours, inputs, grads), (inputs, grads, form)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_has_the_bits_of_transformers(name, dtype):
    for weight in (None, torch.float32):
        (theirs, _), (ours, _), _ = both(name, dtype, weight)
        for a, b in zip(theirs, ours, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("weight", [torch.float64, torch.float32])
def test_float64_gradients_have_the_bits_of_transformers(name, weight):
    (_, theirs), (_, ours), _ = both(name, torch.float64, weight)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("name", NORMS)
def test_float32_gradients_agree_with_autograd(name):
    (_, theirs), (_, ours), _ = both(name, torch.float32)
    # Both are a few float32 roundings from the truth, in another order.
    for a, b in zip(theirs, ours, strict=True):
        assert (a - b).norm() / a.norm() < 1e-6


@pytest.mark.parametrize("name", NORMS)
def test_bf16_gradients_are_closer_to_float64(name):
    (_, theirs), (_, ours), (inputs, grads, form) = both(name, torch.bfloat16)
    case = random_case((1, 96))
    case.x, case.residual, case.weight = (t.detach() for t in inputs)
    case.casting, case.offset = form["casting"], form["offset"]
    dx, dw, *_ = norm_gradients(case, *grads)
    for mine, other, truth in zip(ours, theirs, (dx, dx, dw), strict=True):
        error = (mine.double() - truth).norm() / truth.norm()
        assert error <= 1.001 * (other.double() - truth).norm() / truth.norm()
        assert error < U[torch.bfloat16]


@pytest.mark.parametrize("casting", ["llama", "gemma", "gpt_oss"])
@pytest.mark.parametrize("dtype", list(U))
def test_against_float64(casting, dtype):
    for residual in (False, True):
        check_norm(random_case((5, 7, 33), dtype, casting, residual=residual))


def test_weight_gradient_is_reduced_before_it_is_rounded():
    case = random_case((9, 64), casting="gemma")
    seen = []

    def reduce(dw):
        seen.append(dw)
        return dw * 2

    w = case.weight.requires_grad_()
    y = rms_norm(case.x, w, 1e-6, reduce=reduce, **case.form)
    dy = like(y)
    (dw,) = torch.autograd.grad(y, w, dy)
    assert [t.dtype for t in seen] == [torch.float32]
    assert torch.equal(dw, (seen[0] * 2).bfloat16())
    x64 = case.x.double()
    y = rms_norm(x64, w.detach().double().requires_grad_(), 1e-6, reduce=reduce, **case.form)
    y.sum().backward()
    assert seen[1].dtype == torch.float64


def test_a_frozen_weight_is_not_reduced():
    case = random_case((9, 64))
    x = case.x.requires_grad_()
    y = rms_norm(x, case.weight, 1e-6, reduce=lambda dw: pytest.fail("called"))
    y.sum().backward()
    assert x.grad is not None


def test_what_is_saved():
    case = random_case((4, 5, 64), residual=True)
    case.x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, s = rms_norm(case.x, case.weight, 1e-6, residual=case.residual)
    assert [tuple(t.shape) for t in saved] == [(4, 5, 64), (4, 5), (64,)]
    assert saved[0].data_ptr() == s.data_ptr()
    assert saved[1].dtype == torch.float32
    assert saved[2] is case.weight


@pytest.mark.parametrize("used", ["y", "s"])
def test_one_output_unused(used):
    case = random_case((4, 64), residual=True)
    x, residual, w = (t.requires_grad_() for t in (case.x, case.residual, case.weight))
    y, s = rms_norm(x, w, 1e-6, residual=residual)
    (y if used == "y" else s).sum().backward()
    assert torch.equal(x.grad, residual.grad)
    if used == "s":
        assert torch.equal(x.grad, torch.ones_like(x))
        assert w.grad is None
    else:
        alone = random_case((4, 64), residual=True)
        alone.x, alone.residual = case.s.detach(), None
        leaf = alone.x.requires_grad_()
        (dx,) = torch.autograd.grad(rms_norm(leaf, w, 1e-6).sum(), leaf)
        assert torch.equal(dx, x.grad)


def test_residual_of_another_dtype():
    case = random_case((4, 64))
    x = case.x.requires_grad_()
    residual = torch.randn(4, 64, requires_grad=True)
    y, s = rms_norm(x, case.weight, 1e-6, residual=residual)
    assert (y.dtype, s.dtype) == (torch.float32, torch.float32)
    (y.sum() + s.sum()).backward()
    assert (x.grad.dtype, residual.grad.dtype) == (torch.bfloat16, torch.float32)


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
        y, s = rms_norm(x, w, 1e-6, residual=x)
        y.sum().backward()
        assert (y.dtype, s.dtype, w.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
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


@pytest.mark.parametrize("reduced", [False, True])
def test_fullgraph_compile_has_the_bits_of_eager(reduced):
    case = random_case((5, 64), residual=True)
    x, residual, w = (t.requires_grad_() for t in (case.x, case.residual, case.weight))
    reduce = (lambda dw: dw * 2) if reduced else None

    def call(x, residual, w):
        return rms_norm(x, w, 1e-6, residual=residual, reduce=reduce)

    grads = [like(x, 1), like(x, 2)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    theirs, their_grads = gradients(compiled, [x, residual, w], grads)
    ours, our_grads = gradients(call, [x, residual, w], grads)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    # Autograd's own backward there: each of its handful of bf16 roundings is u at most.
    for a, b in zip(their_grads, our_grads, strict=True):
        assert (a - b).float().norm() / b.float().norm() < 4 * U[torch.bfloat16]


def test_compile_copies_into_out():
    case = random_case((5, 64))
    out = torch.zeros_like(case.x)
    x = case.x.requires_grad_()
    y = torch.compile(
        lambda x: rms_norm(x, case.weight, 1e-6, out=out), fullgraph=True, backend="aot_eager"
    )(x)
    assert torch.equal(y, out)
    assert y.requires_grad
    assert not out.requires_grad


def test_out_is_written_and_returned():
    case = random_case((4, 64), residual=True)
    buffer = torch.zeros(8, 64, dtype=torch.bfloat16)
    out, version = buffer[4:], buffer._version
    x = case.x.requires_grad_()
    y, _ = rms_norm(x, case.weight, 1e-6, residual=case.residual, out=out)
    wanted, _ = rms_norm(x, case.weight, 1e-6, residual=case.residual)
    assert y.data_ptr() == out.data_ptr()
    assert torch.equal(buffer[4:], wanted)
    assert buffer._version > version
    assert not out.requires_grad
    assert not buffer.requires_grad
    dy = like(y)
    assert torch.equal(*(torch.autograd.grad(t, x, dy)[0] for t in (y, wanted)))


def test_the_buffer_may_be_used_again_while_the_graph_lives():
    case = random_case((4, 64))
    out = torch.zeros_like(case.x)
    x = case.x.requires_grad_()
    y = rms_norm(x, case.weight, 1e-6, out=out)
    out.zero_()
    y.sum().backward()  # nothing of y was saved
    other = torch.ones_like(out, requires_grad=True)
    z = rms_norm(x, case.weight, 1e-6, out=out) * other
    rms_norm(x.detach(), case.weight, 1e-6, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()  # y was saved by the product, and is gone: autograd must know


def test_forward_without_autograd():
    case = random_case((4, 64))
    x = case.x.requires_grad_()
    out = torch.zeros_like(x)
    y, rstd = rms_norm_forward(x, case.weight, 1e-6, out=out)
    assert not y.requires_grad
    assert y.data_ptr() == out.data_ptr()
    assert rstd.shape == (4,)


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
        ({"residual": torch.ones(8)}, ShapeError, "never broadcasts"),
        ({"residual": torch.ones(4, 8, dtype=torch.int32)}, ShapeError, "added to x"),
        ({"out": torch.ones(5, 8)}, ShapeError, "shape"),
        ({"out": torch.ones(4, 8).double()}, ShapeError, "dtype"),
        ({"out": torch.ones(4, 8, device="meta")}, ShapeError, "device"),
        ({"out": torch.ones(4, 8, requires_grad=True)}, ConfigError, r"out.detach\(\)"),
        ({"out": X}, ConfigError, "overlaps x"),
        ({"out": W.expand(4, 8)}, ConfigError, "overlaps weight"),
    ],
)
def test_refusals(kwargs, error, words):
    arguments = {"x": X, "weight": W, "eps": 1e-6} | kwargs
    with pytest.raises(error, match=words) as caught:
        rms_norm(arguments.pop("x"), arguments.pop("weight"), arguments.pop("eps"), **arguments)
    assert "where:" in str(caught.value)
    assert "got:" in str(caught.value)


def test_out_beside_the_input_in_one_storage_is_fine():
    storage = torch.randn(8, 8)
    rms_norm(storage[:4], W, 1e-6, out=storage[4:])
    with pytest.raises(ConfigError, match="overlaps x"):
        rms_norm(storage[:4], W, 1e-6, out=storage[3:7])
    with pytest.raises(ConfigError, match="overlaps residual"):
        rms_norm(X, W, 1e-6, residual=storage[:4], out=storage[3:7])
