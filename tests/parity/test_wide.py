"""Families with float32 inside of a float64 model agree as others do, where that is float64 too.

Their cells elsewhere have larger tolerances (`tiny.FLOAT32`): these show that rounding in
transformers' casts, and nothing of hf_sp, is what they allow.
"""

from __future__ import annotations

import pytest
from harness.parity import Case, assert_parity
from harness.pool import run_once
from harness.wide import train_wide

CASES = (
    Case("qwen3_5", accum=3),
    Case("qwen3_next", checkpoint="non_reentrant"),
    Case("bamba", model_kwargs=(("mamba_n_groups", 1),)),
    Case("falcon_h1", accum=3),
    Case("granite_hybrid", checkpoint="reentrant"),
    Case("gemma3"),
    Case("gemma4", accum=3),
    Case("olmo2"),
    Case("deepseek_v3"),
    Case("qwen3_5", cp=2, steps=1),
    Case("falcon_h1", cp=2, steps=1),
    Case("nemotron_h", cp=2, steps=1),
    Case("deepseek_v3", cp=2, steps=1, parallelize=(("cp_mode", "ring"),)),
)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_it_agrees_in_float64(index):
    assert_parity([reports[index] for reports in run_once(2, train_wide, timeout=240, cases=CASES)])
