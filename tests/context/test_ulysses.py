"""Context parallelism by all-to-alls against the unsharded model: tp 1 and 2, cp 2 and 4."""

from __future__ import annotations

import pytest
from behaviour.inputs import inputs
from harness import tiny
from harness.parity import Case, assert_parity
from harness.pool import run_once

from context import jobs
from context.cells import assert_cell, in_worlds
from hf_sp import supports
from hf_sp.context.ulysses import heads_of_ranks

pytestmark = pytest.mark.slow

TWO = (
    # A sink for each head, which transformers' code reads of the module.
    Case("gpt_oss", cp=2, attn="eager", accum=3, parallelize=(("ep", 1),)),
    Case("llama", cp=2, steps=1),
    Case("qwen3", cp=2, accum=3, optimizer="adamw", checkpoint="non_reentrant"),
    Case("llama_tied", cp=2, loaded=True, dtype="float32", checkpoint="reentrant"),
)
FOUR = (
    Case("gpt_oss", cp=2, attn="eager", checkpoint="non_reentrant"),
    # One key/value head, which travels to all four.
    Case("llama_kv1", cp=4, steps=1),
    # Two windows and a bit in 17 tokens.
    Case("mistral", cp=2, accum=3, steps=1),
    Case("llama", cp=2, sp=False, parallelize=(("kernels", False),), steps=1),
    Case("llama", cp=2, data=2, accum=3),
    Case("mixtral", cp=2, parallelize=(("ep", 2),), checkpoint="non_reentrant"),
    Case("qwen2_moe", cp=4, steps=1),
)


@in_worlds(TWO, FOUR)
def test_training_matches_the_unsharded_model(world, cases, index):
    assert_cell(world, cases, index)


BATCHES = (
    *("length1-batch2", "length3-batch1", "length17-batch3", "no-labels-counted"),
    *("left-padded", "right-padded-num-items", "packed-with-cache", "only-last-token"),
    *("packed-length1-first-and-last", "shard-boundaries-odd", "inputs-embeds"),
    *("shift-labels-num-items", "mask-4d", "mask-of-heads"),
)


@pytest.mark.parametrize("name", BATCHES)
def test_any_batch(name):
    """Shorter than cp, odd, padded, packed, masked by hand; training, evaluation and logits."""
    case = Case("llama_kv1", cp=2)
    assert_parity([made[name] for made in run_once(2, inputs, case=case, only=BATCHES)])


@pytest.mark.parametrize("name", jobs.USES)
def test_uses(name):
    case = Case("llama", cp=2)
    assert_parity([made[name] for made in run_once(2, jobs.uses, case=case)])


@pytest.mark.parametrize("mode", ["ulysses", "ring"])
def test_no_token_sees_another_document_or_the_future(mode):
    for seen, want in run_once(2, jobs.influence, mode=mode):
        assert seen == want


@pytest.mark.parametrize("what", jobs.REFUSALS)
def test_what_is_refused(what):
    """On both ranks alike, before the model is touched."""
    words = jobs.REFUSALS[what]
    for found in run_once(2, jobs.refusals):
        message, untouched = found[what]
        assert untouched
        assert message is not None
        assert [word for word in words if word not in message] == [], message


def test_heads_that_cp_does_not_divide():
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 8}
    config = tiny.config("llama", hidden_size=96, **heads)
    found = supports(config, tp=2, cp=4)
    assert "6 of them on each of tp=2 ranks" in found.reason
    assert "at tp=2: cp = 1, 2, 3, 6" in found.reason
    assert supports(config, tp=2, cp=3)
    assert "cp=3 (ulysses 3)" in str(supports(config, tp=2, cp=3))


@pytest.mark.parametrize(
    ("query", "key_value", "cp", "heads"),
    [
        (8, 8, 2, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 4, 2, [0, 1, 2, 3]),
        (8, 2, 4, [0, 0, 1, 1]),
        (8, 1, 2, [0, 0]),
        (6, 3, 2, [0, 0, 1, 1, 2, 2]),
        (6, 2, 3, [0, 0, 0, 1, 1, 1]),
        (12, 4, 2, [0, 1, 2, 3]),
    ],
)
def test_key_value_heads_travel_as_often_as_they_are_read(query, key_value, cp, heads):
    """Rank r attends with query heads r * query / cp on; each finds its own among those sent."""
    found = heads_of_ranks(query, key_value, cp)
    assert found == heads
    own, count = query // cp, len(found) // cp
    for head in range(query):
        rank, local = divmod(head, own)
        assert found[rank * count + local * count // own] == head * key_value // query
