"""Ring and hybrid attention against the unsharded model, and which of them is taken."""

from __future__ import annotations

from typing import Any

import pytest
from harness import tiny
from harness.noise import noise
from harness.parity import Case, assert_parity
from harness.pool import run_once
from parity.test_low_precision import _check as check_noise

from context import jobs
from context.cells import assert_cell, in_worlds
from context.test_ulysses import BATCHES
from hf_sp import supports
from hf_sp.comm.degrees import ranks_of_node
from hf_sp.plan.exchange import Exchange

RING, HYBRID = {"parallelize": (("cp_mode", "ring"),)}, {"parallelize": (("cp_mode", "hybrid"),)}
TWO = (
    Case("llama_kv1", cp=2, steps=1, **RING),
    # A window of 5 in 17 tokens, and documents.
    Case("mistral", cp=2, accum=3, **RING),
    Case("qwen3", cp=2, accum=3, optimizer="adamw", checkpoint="non_reentrant", **RING),
    Case("llama_tied", cp=2, loaded=True, dtype="float32", checkpoint="reentrant", **RING),
    # Keys and values of two widths.
    Case("deepseek_v3", cp=2, steps=1, **RING),
)
FOUR = (
    Case("llama_kv1", cp=4, **RING),
    # Hops that no token of a window needs.
    Case("mistral", cp=4, accum=3, steps=1, **RING),
    Case("llama", cp=2, accum=3, **RING),
    Case("qwen2_moe", cp=2, checkpoint="non_reentrant", steps=1, **RING),
    Case("llama", cp=2, data=2, accum=3, steps=1, **RING),
    Case("llama", cp=4, checkpoint="reentrant", **HYBRID),
    Case("mixtral", cp=4, steps=1, **HYBRID),
    Case("llama_kv1", cp=4, sp=False, accum=3, steps=1, **HYBRID),
)


@pytest.mark.slow
@in_worlds(TWO, FOUR)
def test_training_matches_the_unsharded_model(world, cases, index):
    assert_cell(world, cases, index)


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCHES)
def test_any_batch(name):
    """Shorter than cp, odd, padded, packed, masked by hand; whole stretches are cut into tiles."""
    case = Case("llama_kv1", cp=2, **RING)
    found = run_once(2, jobs.tiled_inputs, case=case, only=BATCHES)
    assert_parity([made[name] for made in found])


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCHES)
def test_any_batch_of_a_hybrid(name):
    case = Case("llama_kv1", cp=4, **HYBRID)
    found = run_once(4, jobs.tiled_inputs, timeout=240, case=case, only=BATCHES)
    assert_parity([made[name] for made in found])


@pytest.mark.slow
@pytest.mark.parametrize("name", jobs.RING_USES)
def test_uses(name):
    case = Case("llama", cp=2, **RING)
    assert_parity([made[name] for made in run_once(2, jobs.uses, case=case)])


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "autocast"), [("bfloat16", False), ("float32", True)])
def test_low_precision(dtype, autocast):
    """Norms of heads give queries and keys wider than values where autocast is asked to cast."""
    case = Case("qwen3", dtype=dtype, cp=2, **RING)
    for found in run_once(2, noise, case=case, autocast=autocast):
        check_noise(found)


# Of 8 query heads: tp, cp, what was asked for -> how many ranks exchange heads, and places.
CHOSEN = [
    (1, 8, Exchange("ulysses"), "ulysses 8"),
    (1, 4, Exchange("ring"), "ring 4"),
    (1, 8, Exchange(None), "ulysses 8"),
    (1, 8, Exchange(None, node=4), "ulysses 4 x ring 2"),
    (2, 8, Exchange(None, node=8), "ulysses 4 x ring 2"),
    (2, 8, Exchange(None, node=4), "ulysses 2 x ring 4"),
    (8, 4, Exchange(None, node=8), "ring 4"),
    (1, 16, Exchange(None), "ulysses 8 x ring 2"),
    (1, 6, Exchange(None), "ulysses 2 x ring 3"),
    (1, 3, Exchange(None), "ring 3"),
    (1, 8, Exchange("hybrid"), "ulysses 4 x ring 2"),
    (1, 8, Exchange("hybrid", node=2), "ulysses 2 x ring 4"),
    (1, 8, Exchange("hybrid", 2), "ulysses 2 x ring 4"),
    # Heads over machines, where there is no other hybrid.
    (2, 4, Exchange("hybrid", node=2), "ulysses 2 x ring 2"),
]


@pytest.mark.parametrize(("tp", "cp", "asked", "chosen"), CHOSEN)
def test_what_is_chosen(tp, cp, asked, chosen):
    plan = jobs.plan_of(tp, cp, asked)
    assert plan.exchange() == chosen
    assert f"cp={cp} ({chosen})" in str(plan)
    assert ("a ring of" in str(plan)) == ("ring" in chosen)
    assert ("all-to-all of q" in str(plan)) == ("ulysses" in chosen)


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"cp": 16}, ["8 of them on each of tp=1 ranks", "cp = 1, 2, 4, 8", "or cp_mode='ring'"]),
    ({"cp": 8, "cp_mode": "hybrid", "cp_ulysses": 8}, ["cp_ulysses = 2, 4"]),
    ({"cp": 8, "cp_mode": "hybrid", "cp_ulysses": 3}, ["cp_ulysses=3", "cp_ulysses = 2, 4"]),
    ({"cp": 3, "cp_mode": "hybrid"}, ["neither 1 nor cp", "cp_mode='ring'"]),
    ({"cp": 4, "cp_mode": None, "cp_ulysses": 2}, ["cp_ulysses=2, cp_mode=None"]),
    ({"cp": 4, "cp_mode": "x"}, ["'ulysses', 'ring', 'hybrid', None"]),
    ({"cp": 4, "cp_ulysses": 0}, ["cp_ulysses must be a positive integer"]),
]


@pytest.mark.parametrize(("asked", "words"), REFUSED)
def test_what_is_refused(asked, words):
    found = supports(tiny.config("llama"), tp=1, **asked)
    assert not found
    assert [word for word in words if word not in found.reason] == [], found.reason


def test_a_remedy_works():
    """What a refusal names as legal is taken."""
    config = tiny.config("llama")
    for asked in ({"cp": 16, "cp_mode": "ring"}, {"cp": 8, "cp_mode": "hybrid", "cp_ulysses": 4}):
        assert supports(config, tp=1, **asked)
    assert supports(tiny.config("gemma2"), tp=1, cp=2)
    assert "ulysses 2" in str(supports(tiny.config("gemma2"), tp=1, cp=2, cp_mode=None))
    assert "softcap" in supports(tiny.config("gemma2"), tp=1, cp=2, cp_mode="ring").reason


def test_the_machine_is_what_the_launcher_says(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert ranks_of_node() == 8
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert ranks_of_node() == 0
