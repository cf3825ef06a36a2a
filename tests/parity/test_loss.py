"""The loss: its functions alone, models that scale or cap logits, and who meets hidden states."""

from __future__ import annotations

import pytest
import torch
from harness import tiny
from harness.pool import pool
from harness.report import assert_parity

from hf_sp.model.lazy import LazyLogits
from parity import loss_jobs
from parity.loss_jobs import FORWARDS, WATCHERS


@pytest.mark.parametrize("sp", [True, False])
@pytest.mark.parametrize("family", tiny.RELATIVES)
def test_models_that_scale_or_cap_their_logits(family, sp):
    reports = pool(2).run(loss_jobs.scaled_logits, family=family, sp=sp)
    # These take a norm's weight to float32, and so round each rank's part of its gradient.
    assert_parity(reports, 1e-6 if family in ("cohere", "gemma2") and sp else None)


@pytest.mark.parametrize("sp", [True, False])
@pytest.mark.parametrize(
    ("tp", "vocab", "length", "chunk", "options"),
    [
        (2, 40, 8, 4096, {}),
        # Rows of padding, a rank with fewer rows of the vocabulary, several chunks.
        (4, 43, 13, 12, {"softcap": 2.0, "scale": 1.5}),
        # A rank without vocabulary, ranks without tokens, a chunk a row; an id that is ignored.
        (4, 5, 3, 1, {"ignore_index": 3}),
    ],
)
def test_linear_form(tp, vocab, length, chunk, options, sp):
    arguments = {"vocab": vocab, "length": length, "chunk": chunk, "options": options}
    assert_parity(pool(tp).run(loss_jobs.linear, sp=sp, **arguments))


@pytest.mark.parametrize(("tp", "vocab"), [(2, 12), (4, 11)])
def test_every_kind_of_group(tp, vocab):
    assert_parity(pool(tp).run(loss_jobs.every_kind_of_group, vocab=vocab))


@pytest.mark.parametrize("name", WATCHERS)
def test_hooks_meet_whole_hidden_states(name):
    assert_parity(pool(2).run(loss_jobs.watched, name=name))


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_of_the_user(name):
    # transformers' loss rounds float64 logits to float32: 6e-8 in each gradient of the two.
    tolerance = 1e-6 if name in ("caps twice", "peeks at the logits") else None
    assert_parity(pool(2).run(loss_jobs.own_forward, name=name), tolerance)


def test_logits_that_are_made_from_the_shard():
    assert_parity(pool(2).run(loss_jobs.touched_logits))


def test_a_sliced_shard_is_refused():
    for message in pool(2).run(loss_jobs.sliced_shard):
        assert "between the final norm and the LM head" in message


def test_the_gather_is_the_losss_only_where_nobody_looks():
    for facts in pool(2).run(loss_jobs.lazy_where_it_should_be):
        assert all(facts.values()), facts


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    """No further from float64 than the unsharded model in the same precision.

    Both round each matrix product to 2^-9; the parallel one also each rank's part before a sum of
    two, which adds at most as much again.
    """
    for errors in pool(2).run(loss_jobs.half_precision, autocast=autocast):
        for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
            assert errors[f"parallel {name}"] < 2 * errors[f"unsharded {name}"] + 2**-9, errors


# What a model may do to its logits, and what of it the loss knows as (scale, softcap).
CHAINS = {
    "nothing": (lambda x: x, (1.0, None)),
    "Cohere": (lambda x: x * 0.25, (0.25, None)),
    "Granite": (lambda x: x / 4, (0.25, None)),
    "number first": (lambda x: 3 * x, (3.0, None)),
    "Gemma 2": (lambda x: torch.tanh(x / 30.0) * 30.0, (1.0, 30.0)),
    "scaled and capped": (lambda x: 5 * torch.tanh(x * 2 / 4).mul(2.0).div(1.0), (5.0, 10.0)),
    "another cap than slope": (lambda x: x.tanh() * -2, (-2.0, -2.0)),
    "two caps": (lambda x: x.tanh().tanh(), None),
    "capped to nothing": (lambda x: x.tanh() * 0, None),
}
MADE = {
    "a tensor's product": lambda x: x * torch.tensor(2.0),
    "sum": lambda x: x + 1,
    "rounded quotient": lambda x: torch.div(x, 2, rounding_mode="floor"),
    "number over it": lambda x: 2.0 / x,
    "by zero": lambda x: x / 0,
    "in place": lambda x: x.mul_(2.0),
    "a slice": lambda x: x[:1],
    "bool": lambda x: x * True,
    "transposed": lambda x: x.t(),
}


def _lazy():
    real = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    return real, LazyLogits((2, 3), real, real.clone, real, "request")


@pytest.mark.parametrize("name", CHAINS)
def test_chains_that_wait(name):
    """What the loss would compute is what the model's own operations do."""
    function, known = CHAINS[name]
    real, lazy = _lazy()
    result = function(lazy)
    assert isinstance(result, LazyLogits)
    assert (result.made, result.request) == (False, "request")
    assert (result.shape, result.dtype) == (real.shape, real.dtype)
    assert result.scale_and_softcap() == (None if known is None else pytest.approx(known))
    assert torch.equal(result.materialize(), function(real))
    if known is not None:
        scale, cap = known
        z = real * scale
        z = z if cap is None else cap * torch.tanh(z / cap)
        torch.testing.assert_close(z, function(real))


@pytest.mark.parametrize("name", MADE)
def test_operations_that_do_not_wait(name):
    real, lazy = _lazy()
    result = MADE[name](lazy)
    assert lazy.made
    assert type(result) is torch.Tensor
    torch.testing.assert_close(result, MADE[name](real), equal_nan=True)
    # From now on it is that tensor, and so are its products.
    assert type(lazy * 2) is torch.Tensor
