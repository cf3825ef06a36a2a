"""The parity matrix of mixture-of-experts models, with an auxiliary loss of the loss's own size.

HF's routers compute their softmax in float32 in a float64 model, too. Where each rank has a part of
the experts' features, the gradient that comes in there is a part as well, and is rounded to 24 bits
before the parts are summed: 6e-8 of a router's gradient, a few times that after two steps. So the
matrix runs with routers in float64 (tiny.float64_router), to the 1e-10 of every dense family, and
once more with HF's own to 1e-6.
"""

from __future__ import annotations

import itertools

import pytest
from harness.pairwise import pairs_of, pairwise, possible_pairs
from harness.parity import Case, assert_parity, train_all
from harness.pool import run_once

TPS = (2, 4)
OWN_ROUTER = 1e-6
# HF records router logits without a graph in a reentrant checkpoint: its auxiliary loss has no
# gradient there, in the unsharded model too.
WITHOUT_AUX = (("output_router_logits", False),)


FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
# Pairwise, as tests/parity/test_matrix.py is: every family at every tp meets every value below.
FACTORS = {
    "model": tuple(itertools.product(FAMILIES, TPS)),
    # Plain tensor parallelism, every expert split over the ranks, and whole experts on each rank.
    "way": ("tp-only", "sp", "ep"),
    "checkpoint": ("none", "non_reentrant", "reentrant"),
    "options": ((), (("kernels", False),), (("recompute", "none"),)),
    "accum": (1, 3),
    "optimizer": ("sgd", "adamw"),
}
ROWS = pairwise(FACTORS)


def _case(row: dict) -> Case:
    (family, tp), checkpoint = row["model"], row["checkpoint"]
    return Case(
        family,
        row["way"] != "tp-only",
        checkpoint=checkpoint,
        accum=row["accum"],
        optimizer=row["optimizer"],
        parallelize=((("ep", tp),) if row["way"] == "ep" else ()) + row["options"],
        model_kwargs=WITHOUT_AUX if checkpoint == "reentrant" else (),
    )


def _cells(family: str, tp: int) -> tuple[Case, ...]:
    # The dtype changes the arithmetic, not the collectives: each way once, on one tp.
    single = Case(family, dtype="float32", parallelize=() if tp == 2 else (("ep", tp),))
    return (*(_case(row) for row in ROWS if row["model"] == (family, tp)), single)


CELLS = [
    pytest.param(
        tp,
        family,
        index,
        id=f"tp{tp}-{case}-{dict(case.parallelize)}",
        marks=[pytest.mark.slow] if tp == 4 else [],
    )
    for tp in TPS
    for family in FAMILIES
    for index, case in enumerate(_cells(family, tp))
]


@pytest.mark.parametrize(("tp", "family", "index"), CELLS)
def test_training_matches_the_unsharded_model(tp, family, index):
    cases = _cells(family, tp)
    per_rank = run_once(tp, train_all, timeout=240, cases=cases)
    assert_parity([reports[index] for reports in per_rank])


def test_every_pair_is_in_the_matrix():
    assert set().union(*map(pairs_of, ROWS)) == possible_pairs(FACTORS)


@pytest.mark.slow
@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("family", ["mixtral_own_router", "qwen3_moe_own_router"])
def test_with_the_routers_of_transformers(tp, family):
    cases = (Case(family), Case(family, parallelize=(("ep", tp),)))
    for reports in run_once(tp, train_all, timeout=180, cases=cases):
        assert_parity(reports, tol=OWN_ROUTER)
