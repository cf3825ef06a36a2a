"""The parity matrix of mixture-of-experts models, with an auxiliary loss of the loss's own size.

HF's routers compute their softmax in float32 in a float64 model, too. Where each rank has a part of
the experts' features, the gradient that comes in there is a part as well, and is rounded to 24 bits
before the parts are summed: 6e-8 of a router's gradient, a few times that after two steps. So the
matrix runs with routers in float64 (tiny.float64_router), to the 1e-10 of every dense family, and
once more with HF's own to 1e-6.
"""

from __future__ import annotations

import pytest
from harness.parity import Case, assert_parity, train_all
from harness.pool import run_once

TPS = (2, 4)
OWN_ROUTER = 1e-6
# HF records router logits without a graph in a reentrant checkpoint: its auxiliary loss has no
# gradient there, in the unsharded model too.
WITHOUT_AUX = (("output_router_logits", False),)


def _cells(family: str, tp: int) -> tuple[Case, ...]:
    travel = (("ep", tp),)
    return (
        Case(family, sp=False),
        Case(family, sp=False, accum=3, optimizer="adamw", checkpoint="non_reentrant"),
        Case(family, accum=3, optimizer="adamw"),
        Case(family, checkpoint="non_reentrant"),
        Case(family, checkpoint="reentrant", model_kwargs=WITHOUT_AUX),
        Case(family, parallelize=(("kernels", False),)),
        Case(family, parallelize=travel),
        Case(family, parallelize=travel, accum=3, optimizer="adamw", checkpoint="non_reentrant"),
        Case(family, parallelize=travel, checkpoint="reentrant", model_kwargs=WITHOUT_AUX),
        Case(family, parallelize=(*travel, ("recompute", "none"))),
        Case(family, dtype="float32"),
        Case(family, dtype="float32", parallelize=travel),
    )


FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
CELLS = [
    pytest.param(tp, family, index, id=f"tp{tp}-{case}-{dict(case.parallelize)}")
    for tp in TPS
    for family in FAMILIES
    for index, case in enumerate(_cells(family, tp))
]


@pytest.mark.parametrize(("tp", "family", "index"), CELLS)
def test_training_matches_the_unsharded_model(tp, family, index):
    cases = _cells(family, tp)
    per_rank = run_once(tp, train_all, timeout=240, cases=cases)
    assert_parity([reports[index] for reports in per_rank])


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("family", ["mixtral_own_router", "qwen3_moe_own_router"])
def test_with_the_routers_of_transformers(tp, family):
    cases = (Case(family), Case(family, parallelize=(("ep", tp),)))
    for reports in run_once(tp, train_all, timeout=180, cases=cases):
        assert_parity(reports, tol=OWN_ROUTER)
