"""What families need that those of the matrix lack, one row for each mechanism.

Packed linears, norms over all heads, scaled embeddings, low-rank projections, routers with a
correction: every gradient and two clipped steps, as in the matrix. A slice of what
`scripts/families.py` compares runs here too.
"""

from __future__ import annotations

import pytest
from harness import tiny
from harness.parity import Case, assert_parity, train_all
from harness.pool import pool, run_once

from parity import family_jobs
from scripts._families.compare import check


def _cases(tp: int) -> tuple[Case, ...]:
    more = ("recompute", "none"), ("kernels", False)
    cases = (
        Case("phi3"),
        Case("phi3", sp=False, accum=3),
        Case("phi3_mha", checkpoint="reentrant"),
        Case("glm4", checkpoint="non_reentrant", optimizer="adamw"),
        Case("gemma3", accum=3),
        Case("gemma3", sp=False, parallelize=more[1:]),
        Case("olmo2", accum=3),
        Case("olmo2", sp=False, checkpoint="non_reentrant"),
        Case("gpt_neox", checkpoint="reentrant"),
        Case("gpt_neox", sp=False),
        Case("gemma4", accum=3),
        Case("gemma4", sp=False, parallelize=more[:1]),
        Case("gemma4", checkpoint="non_reentrant", parallelize=(("ep", tp),)),
        Case("gpt_oss", attn="eager", accum=3),
        Case("gpt_oss", attn="eager", sp=False, checkpoint="reentrant"),
        Case("gpt_oss", attn="eager", parallelize=(("ep", tp),)),
        Case("gpt_oss", attn="eager", parallelize=more[:1]),
        Case("deepseek_v3", accum=3),
        Case("deepseek_v3", sp=False, checkpoint="non_reentrant"),
        Case("deepseek_v3", parallelize=(("ep", tp),)),
        Case("deepseek_v3", parallelize=more[:1]),
        Case("qwen3_5", accum=3),
        Case("qwen3_5", sp=False, checkpoint="non_reentrant", optimizer="adamw"),
        Case("qwen3_5", checkpoint="reentrant", parallelize=more[1:]),
        Case("qwen3_next", checkpoint="non_reentrant"),
        Case("bamba", accum=3, checkpoint="reentrant"),
        Case("bamba", sp=False),
        # A group of heads for all ranks, or for half of four.
        Case("bamba", model_kwargs=(("mamba_n_groups", tp // 2),), checkpoint="non_reentrant"),
        Case("falcon_h1", accum=3),
        Case("falcon_h1", checkpoint="non_reentrant"),
        Case("granite_hybrid", accum=3, checkpoint="reentrant"),
        Case("granite_hybrid", checkpoint="non_reentrant"),
        Case("qwen3_next", parallelize=(("ep", tp),)),
    )
    apart = (("phi3", {}), ("olmo2", {}), ("qwen3_5", {}), ("gpt_oss", {"attn": "eager"}))
    return cases + tuple(Case(f, loaded=tp == 2, data=tp // 2, **more) for f, more in apart)


CELLS = [
    pytest.param(
        tp,
        index,
        id=f"tp{tp}-{case}-{dict(case.parallelize)}{'-loaded' * case.loaded}",
        marks=[pytest.mark.slow] if tp == 4 else [],
    )
    for tp in (2, 4)
    for index, case in enumerate(_cases(tp))
]


@pytest.mark.parametrize(("tp", "index"), CELLS)
def test_training_matches_the_unsharded_model(tp, index):
    cases = _cases(tp)
    per_rank = run_once(tp, train_all, timeout=240, cases=cases)
    tolerance = tiny.FLOAT32.get(cases[index].family)
    assert_parity([reports[index] for reports in per_rank], tol=tolerance)


# Of the last: keys that an indexer chooses, routers of other shapes, values of another size,
# pictures; a wrapper that reads a row of the embedding, a tower that reads a child's weight.
SLICE = ("smollm3", "cohere2", "exaone4", "phi", "apertus", "bitnet")
SLICE += ("deepseek_v32", "ernie4_5_moe", "laguna", "mimo_v2_flash")
SLICE += ("qwen3_vl", "gemma4", "glm4v")


@pytest.mark.parametrize("family", [*SLICE, "llama, token classification"])
def test_a_slice_of_the_table(family):
    for found in pool(2).run(check, family=family):
        assert not found["problems"]


def test_rows_of_the_embedding():
    assert_parity(pool(2).run(family_jobs.rows_of, case=family_jobs.Case("llama")))
