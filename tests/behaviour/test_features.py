"""Uses beyond the parity matrix, each against the unsharded model where there is one."""

from __future__ import annotations

import pytest
from harness.pool import pool
from harness.report import assert_parity

from behaviour import jobs


@pytest.mark.parametrize("sp", [True, False])
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_classifiers(kind, sp):
    assert_parity(pool(2).run(jobs.classifier, kind=kind, sp=sp))


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        # Scales embeddings, residuals and logits.
        (
            "granite",
            {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
        ),
        # Norms without weights.
        ("olmo", {"clip_qkv": None}),
        # Biases on q, k and v and none on o; a head_dim of its own.
        ("seed_oss", {"head_dim": 8, "attention_dropout": 0.0, "residual_dropout": 0.0}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
        # q, k and v in one projection; its attention has a head_size, and no head_dim.
        ("gpt_neox", {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
    ],
)
def test_kin_outside_the_matrix(model_type, config):
    assert_parity(pool(2).run(jobs.kin, model_type=model_type, **config))


@pytest.mark.parametrize(("family", "ep"), [("llama_tied", 1), ("qwen2_moe", 1), ("qwen2_moe", 2)])
def test_norm_of_gradients(family, ep):
    assert_parity(pool(2).run(jobs.norm_of_gradients, family=family, ep=ep))


def test_data_is_written():
    for wrong in pool(2).run(jobs.data_written):
        assert {name: names for name, names in wrong.items() if names} == {}
        assert len(wrong) == 6


@pytest.mark.parametrize("ep", [1, 2])
def test_weights_drawn_again(ep):
    """Ranks seeded alike, and apart: what the first rank would draw alone."""
    assert pool(2).run(jobs.initialised_again, ep=ep) == [[], []]


@pytest.mark.parametrize("sp", [True, False])
def test_world_of_one(sp):
    assert_parity(pool(1).run(jobs.world_of_one, sp=sp))


def test_noise_on_the_embedding():
    assert_parity(pool(2).run(jobs.embedding_noise))


def test_loss_function_of_the_user():
    assert_parity(pool(2).run(jobs.own_loss_function))


@pytest.mark.parametrize(
    ("chunk", "options"), [(1, {}), (7, {"ignore_index": 5}), (16, {"num_items_in_batch": 11})]
)
def test_loss_options(chunk, options):
    assert_parity(pool(2).run(jobs.loss_options, chunk=chunk, **options))


def test_float16_loss_does_not_underflow():
    for errors in pool(2).run(jobs.half_precision_loss):
        # float16 rounds to 2^-11; the unsharded model, which loses small terms, may be far off.
        assert errors["parallel"] < 4e-3
        assert errors["parallel"] <= errors["unsharded"] * 1.5


@pytest.mark.parametrize("checkpoint", [False, True])
def test_attention_dropout(checkpoint):
    for facts in pool(2).run(jobs.attention_dropout, checkpoint=checkpoint):
        assert all(facts.values()), facts


def test_logits_that_nobody_reads():
    assert pool(2).run(jobs.no_logits) == [(True, True, True)] * 2


def test_optimizers():
    for reports in zip(*pool(2).run(jobs.optimizers), strict=True):
        assert_parity(list(reports))
