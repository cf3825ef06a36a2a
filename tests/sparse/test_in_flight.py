"""Nothing is read before it has arrived, whatever hangs on a shared expert.

On a CPU nothing overlaps. ``sparse.flight`` makes a launched collective's result NaN until it is
waited for, so that the waits are tested here.
"""

from __future__ import annotations

import pytest
from harness.parity import Case
from harness.pool import pool
from harness.report import assert_parity

from sparse import in_flight_jobs
from sparse.in_flight_jobs import _UNWAITED, HANDS

TRAVEL = (("ep", 2),)
WITHOUT_AUX = (("output_router_logits", False),)


@pytest.mark.parametrize(
    "case",
    [
        Case("qwen2_moe", parallelize=TRAVEL),
        Case("qwen2_moe", parallelize=TRAVEL, checkpoint="non_reentrant", accum=3),
        Case("qwen2_moe", parallelize=TRAVEL, checkpoint="reentrant", model_kwargs=WITHOUT_AUX),
        Case("qwen2_moe", parallelize=(*TRAVEL, ("kernels", False), ("recompute", "none"))),
        Case("mixtral", parallelize=TRAVEL),
        Case("qwen2_moe"),
    ],
    ids=lambda case: f"{case}-{dict(case.parallelize)}",
)
def test_nothing_is_read_before_it_has_arrived(case):
    assert_parity(pool(2).run(in_flight_jobs.train_in_flight, case=case))


def test_nothing_is_read_before_it_has_arrived_on_four_ranks():
    case = Case("qwen2_moe", parallelize=(("ep", 4),))
    assert_parity(pool(4).run(in_flight_jobs.train_in_flight, case=case))


@pytest.mark.parametrize("what", sorted(_UNWAITED))
def test_every_wait_is_needed(what):
    """The proof that ``sparse.flight`` sees."""
    assert all(pool(2).run(in_flight_jobs.unwaited, what=what))


# --- uses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", sorted(HANDS))
def test_hands_on_the_shared_expert(kind, checkpoint):
    """Who looks sees what HF's code shows, and gradients are right in any case."""
    assert_parity(pool(2).run(in_flight_jobs.hands, kind=kind, checkpoint=checkpoint))


def test_in_a_checkpoint_of_its_own():
    assert_parity(pool(2).run(in_flight_jobs.in_a_checkpoint_of_its_own))


@pytest.mark.parametrize(
    "targets", [("gate_proj", "up_proj", "down_proj"), ("up_proj", "shared_expert_gate")]
)
def test_lora(targets):
    assert_parity(pool(2).run(in_flight_jobs.lora, targets=targets))


def test_nobody_asks_for_the_input_gradient():
    assert_parity(pool(2).run(in_flight_jobs.first_layer_frozen))


@pytest.mark.parametrize("where", ["router", "shared"])
def test_interrupted_forward(where):
    assert_parity(pool(2).run(in_flight_jobs.interrupted, where=where))


def test_tokens_written_before_the_router():
    assert_parity(pool(2).run(in_flight_jobs.written_between))


@pytest.mark.parametrize("form", ["early", "function"])
def test_block_that_is_changed_behind_our_back(form):
    assert_parity(pool(2).run(in_flight_jobs.block_of_another_form, form=form))
