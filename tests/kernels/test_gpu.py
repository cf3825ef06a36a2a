"""On a GPU: the compiled kernels under the same checks, and what the interpreter cannot show.

pytest -m gpu tests/kernels
"""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from hf_sp.kernels import rms_norm, swiglu
from hf_sp.kernels.norm import rms_norm_backward, rms_norm_forward
from hf_sp.kernels.swiglu import swiglu_backward, swiglu_forward
from tests.kernels.exact import U, check_norm, like, random_case
from tests.kernels.hugging_face import NORMS, norm
from tests.kernels.test_norm_triton import SHAPES, VIEWS
from tests.kernels.test_swiglu import check_swiglu, random_pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOTH = {"rms_norm_forward_kernel", "rms_norm_backward_kernel"}


def on_gpu(case):
    for name in ("x", "weight"):
        value = getattr(case, name)
        setattr(case, name, None if value is None else value.cuda())
    return case


@pytest.mark.parametrize("casting", ["llama", "gemma", "gpt_oss"])
@pytest.mark.parametrize("shape", [*SHAPES, (700, 4096), (4096, 128)], ids=str)
def test_norm_against_float64(shape, casting, ran):
    for dtype in U:
        case = on_gpu(random_case(shape, dtype, casting))
        first, second = check_norm(case), check_norm(case)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert set(ran()) == BOTH


@pytest.mark.parametrize("name", VIEWS)
def test_views(name, ran):
    case = random_case((1, 1))
    x = VIEWS[name]()
    # .cuda() would make it dense: the same strides in a storage on the device.
    base = torch.as_strided(x, (x.untyped_storage().size() // 2,), (1,), 0).cuda()
    case.x = base.as_strided(x.shape, x.stride(), x.storage_offset())
    case.weight = torch.randn(x.shape[-1], device="cuda").bfloat16()
    check_norm(case)
    assert set(ran()) == BOTH


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("n", [128, 4096, 5120])
def test_bits_of_transformers(name, n, ran):
    torch.manual_seed(0)
    x = torch.randn(512, n, device="cuda").bfloat16()
    module, form = norm(name, torch.randn(n, device="cuda").bfloat16())
    y = rms_norm(x, module.weight, 1e-6, **form)
    assert (y == module(x)).float().mean().item() > 0.999
    assert set(ran()) == {"rms_norm_forward_kernel"}


@pytest.mark.parametrize("dtype", list(U))
def test_swiglu(dtype, ran):
    for shape in ((1, 7), (33, 1500), (1024, 1024)):
        gate, up = (t.detach().cuda() for t in random_pair(shape, dtype))
        first, second = (check_swiglu(gate, up, like(gate), True) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert set(ran()) == {"swiglu_forward_kernel", "swiglu_backward_kernel"}
    if dtype != torch.float32:
        wanted = F.silu(gate) * up
        assert (swiglu(gate, up) == wanted).float().mean().item() > 0.99


def test_more_than_2_to_the_31_elements():
    rows, n = 2**19 + 3, 4096
    x = torch.randn(rows, n, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    y, rstd = rms_norm_forward(x, w, 1e-6)
    last, _ = rms_norm_forward(x[-5:].clone(), w, 1e-6)
    assert torch.equal(y[-5:], last)
    dx, _ = rms_norm_backward(y, x, rstd, w, 1e-6)
    wanted, _ = rms_norm_backward(y[-5:].clone(), x[-5:].clone(), rstd[-5:].clone(), w, 1e-6)
    assert torch.equal(dx[-5:], wanted)
    del dx
    z = swiglu_forward(x, y)
    assert torch.equal(z[-5:], swiglu_forward(x[-5:].clone(), y[-5:].clone()))
    dgate, dup, _ = swiglu_backward(z, x, y)
    tail = swiglu_backward(z[-5:].clone(), x[-5:].clone(), y[-5:].clone())
    assert torch.equal(dgate[-5:], tail[0])
    assert torch.equal(dup[-5:], tail[1])
    del x, y, z, dgate, dup
    gc.collect()
    torch.cuda.empty_cache()


def test_every_element_is_written():
    """Fresh memory full of NaN: what is left out shows."""
    case = on_gpu(random_case((37, 1000)))
    wanted = check_norm(case)
    torch.cuda.synchronize()
    blocks = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(64)]
    del blocks
    assert all(torch.equal(a, b) for a, b in zip(wanted, check_norm(case), strict=True))


def test_the_current_stream():
    case = on_gpu(random_case((512, 4096)))
    wanted, _ = rms_norm_forward(case.x, case.weight, 1e-6)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.zeros_like(case.x)
        torch.cuda._sleep(10_000_000)
        x.copy_(case.x)
        y, _ = rms_norm_forward(x, case.weight, 1e-6)
    stream.synchronize()
    assert torch.equal(y, wanted)


def test_cuda_graph():
    case = on_gpu(random_case((64, 4096)))
    wanted, _ = rms_norm_forward(case.x, case.weight, 1e-6)
    graph, x = torch.cuda.CUDAGraph(), torch.zeros_like(case.x)
    rms_norm_forward(x, case.weight, 1e-6)
    with torch.cuda.graph(graph):
        y, _ = rms_norm_forward(x, case.weight, 1e-6)
    x.copy_(case.x)
    graph.replay()
    assert torch.equal(y, wanted)


@pytest.mark.gpu2
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current():
    case = random_case((64, 512))
    wanted, _ = rms_norm_forward(case.x.cuda(0), case.weight.cuda(0), 1e-6)
    y, _ = rms_norm_forward(case.x.cuda(1), case.weight.cuda(1), 1e-6)
    assert y.device.index == 1
    assert torch.equal(y.cpu(), wanted.cpu())
