"""Inputs on the host, MLPs in tiles, and both together, against the unsharded model."""

from __future__ import annotations

import pytest
from harness.parity import Case, assert_parity, train_all
from harness.pool import run_once

BOTH = (("offload", True), ("mlp_tile", 3))
TILES = (("mlp_tile", 4),)
TWO = (
    Case("llama", checkpoint="non_reentrant", accum=3, parallelize=BOTH),
    Case("llama_bias", checkpoint="reentrant", optimizer="adamw", parallelize=BOTH),
    # A scaled embedding, and norms behind the MLP.
    Case("gemma2", dtype="float32", attn="eager", steps=1, parallelize=TILES),
    Case("phi3", sp=False, checkpoint="non_reentrant", steps=1, parallelize=BOTH),
    Case("llama_kv1", cp=2, checkpoint="non_reentrant", parallelize=BOTH),
    Case("mixtral", checkpoint="non_reentrant", steps=1, parallelize=(("offload", True),)),
)
FOUR = (
    Case("qwen3", data=2, checkpoint="non_reentrant", accum=3, parallelize=BOTH),
    Case("llama_tied", cp=2, checkpoint="reentrant", steps=1, parallelize=BOTH),
)
CELLS = [(n, cases, i) for n, cases in ((2, TWO), (4, FOUR)) for i in range(len(cases))]
IDS = [f"world{n}-{cases[i]}" for n, cases, i in CELLS]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "cases", "index"), CELLS, ids=IDS)
def test_training_matches_the_unsharded_model(world, cases, index):
    per_rank = run_once(world, train_all, timeout=240, cases=cases)
    assert_parity([reports[index] for reports in per_rank])
