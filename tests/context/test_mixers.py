"""Linear attentions and state-space models over context parallel ranks, against one process."""

from __future__ import annotations

import pytest
from behaviour.inputs import inputs
from harness import tiny
from harness.parity import Case, assert_parity
from harness.pool import run_once

from context import jobs
from context.cells import assert_cell, in_worlds
from hf_sp import supports

pytestmark = pytest.mark.slow

TWO = (
    Case("qwen3_5", cp=2, accum=3, checkpoint="non_reentrant"),
    Case("bamba", cp=2, accum=3, checkpoint="reentrant", optimizer="adamw"),
    Case("qwen3_next", cp=2, loaded=True),
    Case("bamba", cp=2, model_kwargs=(("mamba_n_groups", 1),)),
    Case("falcon_h1", cp=2, accum=3),
    Case("granite_hybrid", cp=2, accum=3, checkpoint="non_reentrant"),
    Case("nemotron_h", cp=2, accum=3),
    Case("granite_hybrid", cp=2, parallelize=(("cp_mode", "ring"),)),
)
FOUR = (
    # A head of keys, or a group of heads, for each.
    Case("qwen3_5", cp=4, checkpoint="reentrant"),
    Case("bamba", cp=4, accum=3),
    Case("qwen3_next", cp=4, steps=1),
    Case("qwen3_5", cp=2, accum=3),
    Case("bamba", cp=2, sp=False, checkpoint="non_reentrant"),
    Case("qwen3_next", cp=2, checkpoint="non_reentrant", parallelize=(("ep", 2),)),
    Case("bamba", cp=2, data=2, accum=3),
    # A group for both cp ranks of a tp rank, and for all four.
    Case("bamba", cp=2, model_kwargs=(("mamba_n_groups", 2),), checkpoint="non_reentrant"),
    Case("bamba", cp=2, model_kwargs=(("mamba_n_groups", 1),), accum=3),
    # Beside attentions around a ring, whose order of tokens a scan has to undo.
    Case("bamba", cp=4, accum=3, parallelize=(("cp_mode", "ring"),)),
    Case("qwen3_5", cp=4, parallelize=(("cp_mode", "hybrid"), ("cp_ulysses", 2))),
)


@in_worlds(TWO, FOUR)
def test_training_matches_the_unsharded_model(world, cases, index):
    assert_cell(world, cases, index)


BATCHES = ("length1-batch2", "length3-batch1", "length17-batch3", "left-padded", "right-padded")
BATCHES += ("packed-with-cache", "inputs-embeds-padded")


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("family", ["bamba", "qwen3_5"])
def test_any_batch(family, name):
    """Shorter than cp, odd, padded, packed; training, evaluation and logits."""
    made = run_once(2, inputs, case=Case(family, cp=2), only=BATCHES)
    assert_parity([reports[name] for reports in made], tol=tiny.FLOAT32[family])


USES = ("hidden states", "generation")


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("family", ["bamba", "qwen3_5"])
def test_uses(family, name):
    """A forward that fills a cache is whole on each rank: then a rank has tp's heads."""
    made = run_once(2, jobs.uses, case=Case(family, cp=2), only=USES)
    assert_parity([reports[name] for reports in made], tol=tiny.FLOAT32[family])


def test_heads_that_cp_does_not_divide():
    config = tiny.config("qwen3_5", linear_num_key_heads=2, linear_num_value_heads=8)
    found = supports(config, tp=1, cp=4)
    assert "2 heads of a mixer, on tp * cp = 4 ranks" in found.reason
    assert "at tp=1: cp = 1, 2" in found.reason
    assert "mixer: all-to-all of its projections" in str(supports(config, tp=1, cp=2))
