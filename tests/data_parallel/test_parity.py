"""The parity matrix with data parallel ranks beside tp, each group with a batch of its own.

The truth is the unsharded model's gradient of the mean of the groups' losses. Experts: in FSDP's
hands (split by features, or whole over tp), and whole over all ranks (ep = tp * dp_shard).

Two groups, because halving is exact: HF's RMSNorm rounds gradients to 24 bits, and the mean of
three such is not the rounded third (1e-7).
"""

from __future__ import annotations

import pytest
from harness.parity import Case, assert_parity, train_all
from harness.pool import run_once

pytestmark = pytest.mark.slow

# As in tests/sparse: HF's auxiliary loss has no gradient in a reentrant checkpoint.
WITHOUT_AUX = (("output_router_logits", False),)
AdamW = {"accum": 3, "optimizer": "adamw", "checkpoint": "non_reentrant"}


def _ep(degree: int) -> dict:
    return {"parallelize": (("ep", degree),)}


DENSE = (
    Case("llama", data=2),
    Case("llama", data=2, **AdamW),
    Case("llama", data=2, checkpoint="reentrant"),
    Case("llama", data=2, sp=False),
    Case("llama", data=2, parallelize=(("kernels", False),)),
    Case("llama", data=2, parallelize=(("dp_shard", None), ("dp_replicate", 2))),
    Case("llama", data=2, dtype="float32"),
    # Head and embedding are one weight; q and k norms have gradients of a part of the heads each.
    Case("qwen3", data=2, model_kwargs=(("tie_word_embeddings", True),)),
)
SPARSE = (
    Case("mixtral", data=2),
    Case("mixtral", data=2, **_ep(2)),
    Case("mixtral", data=2, **_ep(4)),
    Case("mixtral", data=2, **_ep(4), **AdamW),
    Case("qwen2_moe", data=2, **_ep(4)),
    Case("qwen2_moe", data=2, **_ep(4), **AdamW),
    Case("qwen3_moe", data=2, **_ep(4)),
    Case("qwen3_moe", data=2, **_ep(4), checkpoint="reentrant", model_kwargs=WITHOUT_AUX),
    Case("qwen3_moe", data=2, dtype="float32", **_ep(4)),
)
# Data parallel ranks alone: tp = 1.
TWO = (
    Case("llama", data=2),
    Case("qwen2_moe", data=2),
    Case("qwen2_moe", data=2, **_ep(2)),
)
WORLDS = ((4, DENSE), (4, SPARSE), (2, TWO))
CELLS = [
    pytest.param(world, cases, index, id=f"world{world}-{case}-{dict(case.parallelize)}")
    for world, cases in WORLDS
    for index, case in enumerate(cases)
]


@pytest.mark.parametrize(("world", "cases", "index"), CELLS)
def test_training_matches_the_unsharded_model(world, cases, index):
    per_rank = run_once(world, train_all, timeout=240, cases=cases)
    assert_parity([reports[index] for reports in per_rank])
