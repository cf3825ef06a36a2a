"""Vocab-parallel cross entropy in one process: kernels (interpreted) and torch against float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_sp.errors import ConfigError, ShapeError
from hf_sp.kernels import cross_entropy_triton, vocab_parallel_cross_entropy
from hf_sp.kernels.cross_entropy_steps import (
    LossTerms,
    combine,
    token_statistics,
    write_gradient,
)
from hf_sp.kernels.table import LaunchConfig
from tests.kernels.loss_truth import IGNORE, case, check, truth

BOTH = {"statistics_kernel", "gradient_kernel"}
FORMS = {
    "plain": {},
    "scaled": {"scale": 0.25},
    "capped": {"softcap": 5.0},
    "both": {"scale": -1.5, "softcap": 7.0},
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def run(x, labels, dloss, **options):
    """Loss and gradient through autograd."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf, labels, **options)
    (grad,) = torch.autograd.grad(loss, leaf, dloss)
    return loss.detach(), grad


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_against_float64(form, dtype, triton, ran):
    # One column; one lane short of a block of 16; more than a block of 4096, and ragged.
    for tokens, columns in (((4,), 1), ((2, 3), 15), ((7,), 96), ((3,), 5003)):
        x, labels, dloss = case(tokens, columns, dtype)
        loss, grad = run(x, labels, dloss, triton=triton, **FORMS[form])
        check(x, labels, loss, grad, dloss, **FORMS[form])
        assert not loss[labels == IGNORE].any()
        assert not grad[labels == IGNORE].any()
    assert set(ran()) == (BOTH if triton and dtype != torch.float64 else set())


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_the_same_bits_twice_and_in_place(triton):
    x, labels, dloss = case((9,), 4500)
    first, again = (run(x, labels, dloss, triton=triton) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    # As the chunked loss calls it: the gradient takes the logits' place.
    terms = LossTerms(4500, triton=triton)
    whole = combine(token_statistics(x, labels, terms)[None], labels, terms)
    assert torch.equal(whole.loss, first[0])
    assert write_gradient(x, labels, whole, terms, dloss=dloss) is x
    assert torch.equal(x, first[1])


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_what_is_not_finite(triton):
    """As torch: what a row holds stays in it, and in an ignored row it does nothing at all."""
    rows = torch.tensor([[1.0, 2.0, 3.0, -1.0]] * 8)
    nan, inf = float("nan"), float("inf")
    rows[1, 0], rows[2, 3], rows[3, 1], rows[4, 2] = nan, inf, -inf, -inf
    rows[5], rows[6], rows[7] = -inf, nan, inf
    labels = torch.tensor([2, 2, 2, 2, 2, 2, IGNORE, IGNORE])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, dloss = rows.to(dtype), torch.ones(8)
        loss, grad = run(x, labels, dloss, triton=triton)
        want, _ = truth(x, labels, dloss)
        assert loss.isnan().tolist() == want.isnan().tolist()
        assert loss.isinf().tolist() == want.isinf().tolist()
        assert grad[[0, 3, 4]].isfinite().all()
        assert grad[1].isnan().all()
        assert not grad[6:].any()


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_large_logits(triton):
    """float16's largest, and logits far apart: nothing overflows, the loss is exact."""
    for dtype, size in ((torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 3e38)):
        x = torch.tensor([[size, -size, 0.0], [size, -size, 0.0]]).to(dtype)
        labels = torch.tensor([0, 0])
        loss, grad = run(x, labels, torch.ones(2), triton=triton)
        assert loss.tolist() == [0.0, 0.0]
        assert not grad.any()
        _, capped = run(x, labels, torch.ones(2), triton=triton, softcap=30.0)
        assert not capped[:, :2].any(), "the cap is flat there"


def test_a_target_spread_by_softmax_is_summed_to_zero():
    """Sum over the row of p - onehot, to float32's rounding: the probabilities are whole."""
    x, labels, _ = case((5,), 6000, torch.float32)
    _, grad = run(x, labels, torch.ones(5))
    assert grad.double().sum(1).abs().max() < 6000 * 2**-24


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_strides(triton):
    base, labels, dloss = case((3, 5), 40)
    want = run(base, labels, dloss, triton=triton)
    wide = torch.randn(3, 5, 100).to(base.dtype)
    wide[..., 30:70] = base
    double = torch.randn(3, 5, 80).to(base.dtype)
    double[..., ::2] = base
    sources = {
        "sequence-major": base.transpose(0, 1).contiguous().transpose(0, 1),
        "columns last": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "slice": wide[..., 30:70],
        "every other": double[..., ::2],
        "misaligned": torch.cat([base.flatten()[:1], base.flatten()])[1:].view(3, 5, 40),
    }
    for name, x in sources.items():
        leaf = x.detach().requires_grad_()
        loss = vocab_parallel_cross_entropy(leaf, labels, triton=triton)
        (grad,) = torch.autograd.grad(loss, leaf, dloss)
        assert torch.equal(loss, want[0]), name
        assert torch.equal(grad, want[1]), name
        # In the logits' place, whatever their strides.
        terms = LossTerms(40, triton=triton)
        rows, flat = x.flatten(0, 1), labels.flatten()
        whole = combine(token_statistics(rows, flat, terms)[None], flat, terms)
        kept = rows.stride()
        write_gradient(rows, flat, whole, terms, dloss=dloss.flatten())
        assert rows.stride() == kept
        assert torch.equal(rows.view(want[1].shape), want[1]), name


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_expanded_logits(triton):
    x, labels, dloss = case((4,), 33)
    leaf = x[:1].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf.expand(4, 33), labels, triton=triton)
    (grad,) = torch.autograd.grad(loss, leaf, dloss)
    _, rows = truth(x[:1].expand(4, 33), labels, dloss)
    torch.testing.assert_close(grad.double(), rows.sum(0, keepdim=True), rtol=2e-2, atol=2e-2)


def test_it_can_be_run_twice():
    x, labels, dloss = case((4,), 33)
    x.requires_grad_()
    loss = vocab_parallel_cross_entropy(x, labels)
    first, second = (torch.autograd.grad(loss, x, dloss, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_under_checkpointing():
    x, labels, dloss = case((4,), 33)
    want = run(x, labels, dloss)
    leaf = x.clone().requires_grad_()
    loss = checkpoint(
        lambda y: vocab_parallel_cross_entropy(y * 1, labels),
        leaf,
        use_reentrant=False,
    )
    (grad,) = torch.autograd.grad(loss, leaf, dloss)
    assert torch.equal(grad, want[1])


def test_no_second_derivative():
    x, labels, _ = case((4,), 33, torch.float32)
    x.requires_grad_()
    loss = vocab_parallel_cross_entropy(x, labels, reduction="sum")
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(ConfigError, match="second derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
def test_reductions(triton):
    x, labels, _ = case((6,), 33, torch.float32)
    each = vocab_parallel_cross_entropy(x, labels, triton=triton)
    total = vocab_parallel_cross_entropy(x, labels, reduction="sum", triton=triton)
    mean = vocab_parallel_cross_entropy(x, labels, reduction="mean", triton=triton)
    assert total == each.sum()
    assert mean == each.sum() / labels.ne(IGNORE).sum()
    # An id as the label to ignore; and nothing that counts: NaN, and a gradient of zero.
    x.requires_grad_()
    nothing = torch.full((6,), 5)
    loss = vocab_parallel_cross_entropy(x, nothing, ignore_index=5, reduction="mean", triton=triton)
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isnan()
    assert not grad.any()


def test_no_tokens_and_no_columns(ran):
    x, labels, dloss = case((0,), 33)
    loss, grad = run(x, labels, dloss)
    assert loss.shape == (0,)
    assert grad.shape == x.shape
    stats = token_statistics(torch.empty(3, 0), torch.tensor([1, 2, IGNORE]), LossTerms(33))
    assert stats[0].tolist() == [-torch.inf] * 3
    assert not stats[1:].any()
    assert not ran()


SPLITS = {"even": (40, 40), "odd": (23, 23, 23, 11), "short": (2, 2, 1, 0), "own": (7, 0, 64)}


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split", SPLITS)
def test_columns_on_several_ranks(split, form, triton):
    """The steps on each part, with a row whose logits are all -inf on one of the ranks."""
    sizes = SPLITS[split]
    vocab = sum(sizes)
    x, labels, dloss = case((6,), vocab, torch.float32)
    if "softcap" not in FORMS[form] and vocab > 5:
        x[0, : sizes[0]], labels[0] = -torch.inf, vocab - 1
    terms, parts, start = [], [], 0
    for size in sizes:
        terms.append(LossTerms(vocab, start, triton=triton, **FORMS[form]))
        parts.append(x[:, start : start + size].contiguous())
        start += size
    stats = torch.stack([token_statistics(p, labels, t) for p, t in zip(parts, terms, strict=True)])
    assert stats.shape[1] == 3
    whole = combine(stats, labels, terms[0])
    for part, t in zip(parts, terms, strict=True):
        write_gradient(part, labels, whole, t, dloss=dloss)
    check(x, labels, whole.loss, torch.cat(parts, 1), dloss, **FORMS[form])


def test_every_launch_gives_the_same(ran):
    """Settings of a sweep change the order of sums, not what is summed."""
    x, labels, dloss = case((4,), 3000, torch.float32)
    terms = LossTerms(3000, softcap=20.0)
    for warps, block in ((1, 16), (4, 512), (8, 4096), (16, 8192)):
        config = LaunchConfig(warps=warps, block=block)
        stats = token_statistics(x, labels, terms, config=config)
        whole = combine(stats[None], labels, terms)
        out = torch.full_like(x, torch.nan)
        write_gradient(x, labels, whole, terms, dloss=dloss, out=out, config=config)
        check(x, labels, whole.loss, out, dloss, softcap=20.0)
    assert ran() == {"statistics_kernel": 4, "gradient_kernel": 4}


def test_scalar_gradient_and_rows_of_zeros():
    """A gradient that is one number for all rows; a slab smaller than a row in torch's code."""
    x, labels, _ = case((4,), 3000, torch.float32)
    dloss = torch.tensor(0.5)
    for triton in (True, False):
        terms = LossTerms(3000, triton=triton)
        whole = combine(token_statistics(x, labels, terms)[None], labels, terms)
        grad = write_gradient(x.clone(), labels, whole, terms, dloss=dloss)
        check(x, labels, whole.loss, grad, dloss.expand(4))


def test_torch_holds_no_second_copy(monkeypatch):
    """In slabs of any size the same bits: rows do not know of each other."""
    from hf_sp.kernels import cross_entropy_steps

    x, labels, dloss = case((7,), 130)
    want = run(x, labels, dloss, triton=False, softcap=9.0)
    for slab in (1, 130, 400):
        monkeypatch.setattr(cross_entropy_steps, "_SLAB", slab)
        got = run(x, labels, dloss, triton=False, softcap=9.0)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"labels": torch.zeros(5, dtype=torch.long)}, ShapeError, "belong"),
        ({"labels": torch.zeros(4)}, ShapeError, "ids"),
        ({"labels": torch.tensor([0, 33, 1, 2])}, ShapeError, "outside the vocabulary"),
        ({"labels": torch.tensor([0, -1, 1, 2])}, ShapeError, "outside the vocabulary"),
        ({"logits": torch.zeros(4, 33, dtype=torch.long)}, ShapeError, "belong"),
        ({"reduction": "average"}, ConfigError, "reduction"),
        ({"softcap": 0.0}, ConfigError, "cap"),
        ({"vocab_size": 40}, ShapeError, "part of the whole"),
        ({"vocab_size": 40, "vocab_start": 8}, ShapeError, "part of the whole"),
    ],
)
def test_refusals(change, error, word):
    arguments = {"logits": torch.zeros(4, 33), "labels": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(error, match=word):
        vocab_parallel_cross_entropy(**{**arguments, **change})


def test_labels_of_other_integer_types():
    x, labels, dloss = case((6,), 33)
    want = run(x, labels, dloss)
    got = run(x, labels.to(torch.int32), dloss)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_fake_tensors_take_torch():
    from hf_sp.estimate import fake_tensors

    with fake_tensors():
        x = torch.empty(4, 33, requires_grad=True)
        loss = vocab_parallel_cross_entropy(x, torch.zeros(4, dtype=torch.long), softcap=5.0)
        loss.sum().backward()
        assert x.grad.shape == (4, 33)


def test_defaults_are_in_the_table():
    assert cross_entropy_triton.STATISTICS.block == 4096
    assert cross_entropy_triton.GRADIENT.block == 2048
