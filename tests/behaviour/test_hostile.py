"""What an auditor does to a model to see whether its gradients hold."""

from __future__ import annotations

import pytest
from harness.pool import pool
from harness.report import assert_parity

from behaviour import hostile, own_products
from behaviour.hostile import USES


@pytest.mark.parametrize("sp", [True, False])
@pytest.mark.parametrize("name", sorted(USES))
def test_use(name, sp):
    assert_parity(pool(2).run(hostile.compare, name=name, sp=sp))


def test_product_with_a_shard_is_an_error():
    for message in pool(2).run(own_products.product_outside):
        assert "got mixed torch.Tensor and DTensor" in message


@pytest.mark.parametrize("sp", [True, False])
def test_hooks_of_before(sp):
    assert_parity(pool(2).run(hostile.hooks_of_before, sp=sp))


def test_tuples():
    assert pool(2).run(hostile.tuples) == [(True, True, True)] * 2


def test_second_derivative_is_refused():
    for message in pool(2).run(hostile.second_derivative):
        assert "no second derivative" in message


@pytest.mark.parametrize("kind", ["vocabulary", "dtype", "trainability"])
def test_ranks_with_other_tensors(kind):
    for message in pool(2).run(hostile.ranks_with_other_tensors, kind=kind):
        assert "asked for different things" in message
        assert "weight" in message


@pytest.mark.parametrize(
    ("kind", "name"), [("evaluation", "input_ids"), ("scalar", "num_items_in_batch")]
)
def test_batches_of_later(kind, name):
    for message in pool(2).run(hostile.batches_of_later, kind=kind):
        assert "different batches" in message
        assert name in message
