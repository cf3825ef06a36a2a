"""RMSNorm's Triton kernels, interpreted: against float64, the torch reference and transformers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_sp.kernels import launch as dispatch
from hf_sp.kernels import norm_triton, rms_norm
from hf_sp.kernels.norm import rms_norm_forward
from tests.kernels.exact import (
    U,
    assert_within,
    check_norm,
    fp32_noise,
    like,
    norm_gradients,
    random_case,
)
from tests.kernels.hugging_face import NORMS, norm

CASTINGS = ("llama", "gemma", "gpt_oss")
BOTH = {"rms_norm_forward_kernel", "rms_norm_backward_kernel"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SHAPES = [
    (5, 17),  # odd, a tile mostly empty
    (1, 64),  # one row
    (3, 1),  # one element
    (1000,),  # no leading dimension
    (70, 96),  # more tiles than programs: the loop over rows runs, the last one ragged
    (2, 9, 2, 128),  # heads
    (3, 896),
    (4, 3584),
    (5, 5120),
    (3, 8192),
]


@pytest.mark.parametrize("casting", CASTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, casting, ran):
    # float16 and float32 take turns with bfloat16, which is the one with its own faults.
    other = DTYPES[0] if sum(shape) % 2 else DTYPES[2]
    for dtype in (torch.bfloat16, other):
        case = random_case(shape, dtype, casting)
        ours = check_norm(case)
        theirs = check_norm(case, triton=False)
        # The same arithmetic with sums in another order. A rounding turns out differently where
        # float32 noise, a few of its roundings, meets the middle between two values: as often as
        # the noise is wide, measured in spacings of the dtype; and it may strike twice by chance.
        if dtype != torch.float32:
            allowed = 2 + 16 * U[torch.float32] / U[dtype] * ours[0].numel()
            assert (ours[0] != theirs[0]).sum().item() <= allowed
        # What the weight is multiplied with is rounded in both (llama); of those roundings a few
        # differ, as above. All of them missing would make an error of u / sqrt(3).
        limit = U[dtype] / 8 + fp32_noise(shape[-1])
        assert (ours[2] - theirs[2]).norm() / theirs[2].norm() < limit
    assert set(ran()) == BOTH


@pytest.mark.parametrize(
    ("dtype", "weight", "y_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_mixed_weight_promotes_as_torch_does(dtype, weight, y_dtype, ran):
    y, *_ = check_norm(random_case((3, 64), dtype, weight=weight))
    assert y.dtype == y_dtype
    y, *_ = check_norm(random_case((3, 64), dtype, "gemma", weight=weight))
    assert y.dtype == dtype
    assert set(ran()) == BOTH


@pytest.mark.parametrize("casting", CASTINGS)
def test_without_a_weight(casting, ran):
    case = random_case((6, 64), casting=casting, weight=None)
    y, _, dw = check_norm(case)
    assert dw is None
    assert y.dtype == torch.bfloat16
    assert set(ran()) == BOTH


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("n", [128, 1000, 5120])
def test_bf16_bits_of_transformers(name, n, ran):
    torch.manual_seed(n)
    x = torch.randn(16, n, dtype=torch.bfloat16)
    module, form = norm(name, torch.randn(n).bfloat16())
    wanted = module(x)
    y = rms_norm(x, module.weight, 1e-6, **form)
    assert ran() == {"rms_norm_forward_kernel": 1}
    assert y.dtype == wanted.dtype
    assert (y == wanted).float().mean().item() > 0.999


@pytest.mark.parametrize("name", NORMS)
def test_backward_is_closer_to_float64_than_autograd_over_the_module(name, ran):
    torch.manual_seed(0)
    x = torch.randn(64, 512, dtype=torch.bfloat16, requires_grad=True)
    module, form = norm(name, (1 + 0.3 * torch.randn(512)).bfloat16())
    dy = torch.randn(64, 512, dtype=torch.bfloat16)
    theirs = torch.autograd.grad(module(x), [x, module.weight], dy)
    ours = torch.autograd.grad(rms_norm(x, module.weight, 1e-6, **form), [x, module.weight], dy)
    assert set(ran()) == BOTH
    case = random_case((1, 512))
    case.x, case.weight = x.detach(), module.weight.detach()
    case.casting, case.offset = form["casting"], form["offset"]
    truth = norm_gradients(case, dy)[:2]
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        error = (mine.double() - true).norm() / true.norm()
        # In the gemma form autograd stays in float32, too: then float32 noise decides.
        assert error <= 1.001 * (other.double() - true).norm() / true.norm()
        # The last rounding alone: uniform in +-u of the binade, so about u / sqrt(3) and below u.
        assert error < U[torch.bfloat16]


def test_values_at_the_ends_of_the_range(ran):
    n = 64
    torch.manual_seed(0)
    base = torch.rand(n) * 2 - 1
    rows = {
        torch.float16: [base * 6e4, base * 6e-7, base * 0, base],  # squares overflow float16
        torch.float32: [base * 1e18, base * 3e38, base * 1e-20, base * 0],
        torch.bfloat16: [base * 1e18, base * 3e38, base * 1e-30, base * 0],
    }
    for dtype, values in rows.items():
        x = torch.stack(values).to(dtype)
        w = torch.ones(n, dtype=dtype)
        y, _ = rms_norm_forward(x, w, 1e-6)
        # As transformers': where x^2 overflows float32, rstd and y are 0.
        wanted, _ = rms_norm_forward(x, w, 1e-6, triton=False)
        assert_within(y, wanted.double(), wanted.double().abs() * 2 * U[dtype], "y")
        assert torch.isfinite(y).all()
    assert ran() == {"rms_norm_forward_kernel": 3}


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row(dtype, ran):
    case = random_case((5, 40), dtype)
    x = case.x.clone()
    x[1, 3], x[3, 0] = float("nan"), float("inf")
    x.requires_grad_()
    y = rms_norm(x, case.weight, 1e-6)
    (dx,) = torch.autograd.grad(y, x, like(y))
    wanted = rms_norm(x, case.weight, 1e-6, triton=False)
    (wanted_dx,) = torch.autograd.grad(wanted, x, like(y))
    for found, true in ((y, wanted), (dx, wanted_dx)):
        assert torch.equal(found.isnan(), true.isnan())
        assert torch.isfinite(found[[0, 2, 4]]).all()
        assert found[1].isnan().all()
    assert set(ran()) == BOTH


def fused_qkv(heads, first):
    """Heads of a fused projection: rows of 128 with gaps between the tokens."""
    qkv = torch.randn(2, 5, 1536).bfloat16()
    return qkv[..., first * 128 : (first + heads) * 128].unflatten(-1, (heads, 128))


VIEWS = {
    "q slice": lambda: fused_qkv(4, 0),
    "k slice": lambda: fused_qkv(2, 8),
    "sequence-major": lambda: torch.randn(7, 2, 64).bfloat16().transpose(0, 1),
    "odd offset": lambda: torch.randn(6 * 64 + 1).bfloat16()[1:].view(6, 64),
    "every other row": lambda: torch.randn(8, 64).bfloat16()[::2],
    "expanded": lambda: torch.randn(1, 3, 64).bfloat16().expand(4, 3, 64),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_read_where_they_lie(name, ran, monkeypatch):
    torch.manual_seed(0)
    x = VIEWS[name]()
    pointers = []
    launch = dispatch.launch

    def spy(kernel, grid, *args, **kwargs):
        pointers.append({a.data_ptr() for a in args if isinstance(a, torch.Tensor)})
        return launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(dispatch, "launch", spy)
    case = random_case((1, x.shape[-1]))
    case.x = x
    y, dx, _ = check_norm(case)
    assert all(x.data_ptr() in launched for launched in pointers), "copied"
    assert set(ran()) == BOTH
    # Results lie in memory as the input does, as those of torch operations would.
    assert y.stride() == dx.stride() == torch.empty_like(x).stride()


COPIED = {
    "transposed rows": lambda: torch.randn(64, 6).bfloat16().t(),
    "every other element": lambda: torch.randn(6, 128).bfloat16()[:, ::2],
    "three levels": lambda: torch.randn(2, 8, 8, 64).bfloat16()[:, ::2, ::2],
}


@pytest.mark.parametrize("name", COPIED)
def test_other_strides_are_copied(name, ran):
    torch.manual_seed(0)
    case = random_case((1, 64))
    case.x = COPIED[name]()
    check_norm(case)
    assert set(ran()) == BOTH


@pytest.mark.parametrize("name", VIEWS | COPIED)
def test_incoming_gradients_of_any_strides(name, ran):
    torch.manual_seed(0)
    dy = (VIEWS | COPIED)[name]()
    check_norm(random_case(tuple(dy.shape)), dy=dy)
    assert set(ran()) == BOTH


def test_two_runs_have_the_same_bits():
    first, second = (check_norm(random_case((37, 96))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpointing_has_the_same_bits(ran):
    case = random_case((6, 64))
    x, w = case.x.requires_grad_(), case.weight.requires_grad_()
    dy = like(x)
    plain = torch.autograd.grad(rms_norm(x, w, 1e-6), [x, w], dy)
    y = checkpoint(lambda x: rms_norm(x, w, 1e-6), x, use_reentrant=False)
    again = torch.autograd.grad(y, [x, w], dy)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert ran()["rms_norm_forward_kernel"] == 3


def test_autocast_changes_nothing(ran):
    case = random_case((6, 64), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = rms_norm(case.x, case.weight, 1e-6)
    assert y.dtype == torch.float32
    assert torch.equal(y, rms_norm(case.x, case.weight, 1e-6))
    assert ran() == {"rms_norm_forward_kernel": 2}


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((2, 16384), {"rms_norm_forward_kernel"}),  # the backward spills there: torch
        ((2, 16385), set()),
        ((0, 64), set()),
        ((3, 0, 64), set()),
    ],
)
def test_what_is_left_to_torch(shape, kernels, ran):
    y, _, dw = check_norm(random_case(shape))
    assert y.shape == shape
    assert dw.shape == shape[-1:]
    assert set(ran()) == kernels


def test_a_frozen_side_is_not_computed(ran, monkeypatch):
    seen = []
    launch = dispatch.launch

    def spy(kernel, grid, *args, **kwargs):
        seen.append({k: kwargs[k] for k in ("NEED_DX", "NEED_DW") if k in kwargs})
        return launch(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(dispatch, "launch", spy)
    case = random_case((5, 64))
    both = check_norm(case)
    case.x.requires_grad_()
    y = rms_norm(case.x, case.weight, 1e-6)
    (dx,) = torch.autograd.grad(y, case.x, like(y))
    assert torch.equal(dx, both[1])
    assert seen[-1] == {"NEED_DX": True, "NEED_DW": False}
    case.x.requires_grad_(False)
    case.weight.requires_grad_()
    (dw,) = torch.autograd.grad(rms_norm(case.x, case.weight, 1e-6), case.weight, like(y))
    assert torch.equal(dw, both[2].to(dw.dtype))
    assert seen[-1] == {"NEED_DX": False, "NEED_DW": True}


@pytest.mark.parametrize("rows", [1, 4])
def test_other_settings_give_the_same_results(rows):
    from hf_sp.kernels.table import LaunchConfig

    case = random_case((9, 96))
    config = LaunchConfig(warps=2, rows=rows, stages=3, per_sm=1)
    y, rstd = norm_triton.rms_norm(case.x, case.weight, 1e-6, 0.0, "llama", config=config)
    wanted = check_norm(case)
    assert torch.equal(y, wanted[0])
    dx, dw = norm_triton.rms_norm_backward(
        like(y, 1), case.x, rstd, case.weight, 0.0, "llama", config=config
    )
    assert torch.equal(dx, wanted[1])
    torch.testing.assert_close(dw, wanted[2], rtol=1e-5, atol=1e-5)
