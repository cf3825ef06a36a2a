"""Shared experts run while the tokens travel: in that order, and with the same numbers.

On a CPU nothing overlaps. ``sparse.flight`` makes a launched collective's result NaN until it is
waited for, so that the waits are tested here, and logs the order, which is what a GPU needs.
"""

from __future__ import annotations

import pytest
from harness.parity import Case
from harness.pool import pool
from harness.report import assert_parity

from sparse import overlap_jobs
from sparse.overlap_jobs import _UNWAITED, HANDS

# H = 64; 8 experts of 48 features; a shared expert of 40; two rows of 16 tokens, two experts each.
HIDDEN, TOKENS, ROWS = 64, 32, 64


@pytest.fixture(scope="module", params=[2, 4])
def step(request):
    return request.param, pool(request.param).run(overlap_jobs.order)


def _sizes(tp: int) -> tuple[str, str, int]:
    """Shapes of the shared expert's shard and of a rank's rows, and its features on a rank."""
    return f"({TOKENS // tp}, 1, {HIDDEN})", f"({ROWS // tp}, {HIDDEN})", 40 // tp


def test_forward_order(step):
    """The shared expert's gather, then the rows, then its products, and only then the waits."""
    tp, ranks = step
    shard, rows, features = _sizes(tp)
    for rank in ranks:
        log = rank["forward"]
        at = log.index
        counts = at("launch all_to_all (8,)")
        sent, landed = at(f"launch all_to_all {rows}"), at(f"wait all_to_all {rows}")
        products = [
            i
            for i, line in enumerate(log)
            if line.startswith("product")
            and (f"{HIDDEN}, {features})" in line or f"({features}, {HIDDEN})" in line)
        ]
        experts = [i for i, line in enumerate(log) if line.endswith(f"({HIDDEN}, 96)")]
        reduced = f"reduce_scatter ({TOKENS}, 1, {HIDDEN})"
        assert at(f"launch all_gather {shard}") < counts < sent < at(f"wait all_gather {shard}")
        assert len(products) == 3
        assert sent < products[0]
        assert products[-1] < at(f"launch {reduced}") < landed
        assert not any(
            line.startswith(("wait", "launch all")) for line in log[products[0] : products[-1]]
        )
        assert landed < min(experts, default=landed + 1)
        assert max(experts, default=landed) < at(f"wait {reduced}")


def test_backward_order(step):
    """Its gradient's gather behind the rows of dy, its products while the rows of dx travel."""
    tp, ranks = step
    shard, rows, features = _sizes(tp)
    for rank in ranks:
        log = rank["backward"]
        at = log.index
        # What arrives here for this rank's experts goes back: scales, then rows.
        here = [i for i, line in enumerate(log) if line.startswith("launch all_to_all")]
        dy, dscale, dx, again = here
        assert log[dy] == log[again] == f"launch all_to_all {rows}"
        arrived = log[dx].removeprefix("launch all_to_all ")
        assert log[dscale] == f"launch all_to_all {arrived.split(',')[0]},)"
        gathered = at(f"launch all_gather {shard}")
        assert dy < gathered < at(f"wait all_to_all {rows}") < dscale < dx
        products = [
            i
            for i, line in enumerate(log)
            if line.startswith("product") and (f"{features})" in line or f"({features}," in line)
        ]
        landed = at(f"wait all_to_all {arrived}", dx)
        assert dx < at(f"wait all_gather {shard}") < products[0]
        # down: two; gate and up: dx and, behind another gather, their weights'.
        assert len(products) == 6
        assert products[-1] < landed < again
        # The scales have not waited for dx, which is behind them on the wire.
        assert dscale < at(f"wait all_to_all {arrived.split(',')[0]},)") < landed


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
    assert_parity(pool(2).run(overlap_jobs.train_in_flight, case=case))


def test_nothing_is_read_before_it_has_arrived_on_four_ranks():
    case = Case("qwen2_moe", parallelize=(("ep", 4),))
    assert_parity(pool(4).run(overlap_jobs.train_in_flight, case=case))


@pytest.mark.parametrize("what", sorted(_UNWAITED))
def test_every_wait_is_needed(what):
    """The proof that ``sparse.flight`` sees."""
    assert all(pool(2).run(overlap_jobs.unwaited, what=what))


@pytest.mark.parametrize("tp", [2, 4])
def test_it_costs_next_to_nothing(tp):
    """The same bytes alive for backward, the same collectives of the same bytes.

    At the peak of a layer's backward, the gathered gradient of the shared expert's output is there
    already, in bfloat16, where there was this rank's shard of it.
    """
    for rank in pool(tp).run(overlap_jobs.cost):
        later, at_once = rank["later"], rank["at once"]
        assert (later.pop("late"), at_once.pop("late")) == (2, 0)
        more = later.pop("peak") - at_once.pop("peak")
        assert 0 <= more <= 2 * TOKENS * HIDDEN * (tp - 1) / tp
        assert later == at_once


# --- uses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kind", sorted(HANDS))
def test_hands_on_the_shared_expert(kind, checkpoint):
    """Who looks sees what HF's code shows, and gradients are right in any case."""
    assert_parity(pool(2).run(overlap_jobs.hands, kind=kind, checkpoint=checkpoint))


def test_in_a_checkpoint_of_its_own():
    assert_parity(pool(2).run(overlap_jobs.in_a_checkpoint_of_its_own))


def test_hooks_on_one_rank():
    for message in pool(2).run(overlap_jobs.hooks_on_one_rank):
        assert "different hooks in a block with a shared expert" in message


@pytest.mark.parametrize(
    "targets", [("gate_proj", "up_proj", "down_proj"), ("up_proj", "shared_expert_gate")]
)
def test_lora(targets):
    assert_parity(pool(2).run(overlap_jobs.lora, targets=targets))


def test_nobody_asks_for_the_input_gradient():
    assert_parity(pool(2).run(overlap_jobs.first_layer_frozen))


@pytest.mark.parametrize("mode", ["no_grad", "inference", "autocast", "bfloat16"])
def test_same_numbers(mode):
    for found in pool(2).run(overlap_jobs.same_numbers, mode=mode):
        assert found == (True, True)


def test_copies_and_tracing():
    for found in pool(2).run(overlap_jobs.copied):
        assert found == [2, 2, 0]


@pytest.mark.parametrize("where", ["router", "shared"])
def test_interrupted_forward(where):
    assert_parity(pool(2).run(overlap_jobs.interrupted, where=where))


def test_tokens_written_before_the_router():
    assert_parity(pool(2).run(overlap_jobs.written_between))


def test_tokens_written_behind_the_shared_expert():
    for message in pool(2).run(overlap_jobs.written_behind):
        assert "written into behind its shared expert" in message


@pytest.mark.parametrize("form", ["early", "function"])
def test_block_of_another_form(form):
    """Seen by ``parallelize``: the shared expert runs where it is called."""
    reports = pool(2).run(overlap_jobs.block_of_another_form, when="before", form=form)
    assert_parity(reports)


def test_block_that_is_changed_behind_our_back():
    run = pool(2).run
    job = overlap_jobs.block_of_another_form
    assert_parity(run(job, when="behind", form="early"))
    for message in run(job, when="behind", form="function"):
        assert "given to an autograd Function" in message
