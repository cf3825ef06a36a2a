"""Ranks that part company: agreed on, or refused in the same words on both."""

from __future__ import annotations

import pytest

from integrations import ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("wish", "steps", "saved", "evaluated"),
    [
        ("should_training_stop-on_step_end", 2, [], []),
        ("should_training_stop-on_substep_end", 2, [], []),
        ("should_training_stop-on_log", 2, [], []),
        ("should_epoch_stop-on_step_end", 2, [], []),  # of the only epoch
        ("should_save-on_log", 4, ["checkpoint-2", "checkpoint-3", "checkpoint-4"], []),
        ("should_evaluate-on_step_end", 4, [], [2, 3, 4]),
    ],
)
def test_what_one_rank_asks_for_is_done_by_all(wish, steps, saved, evaluated, rank, runs):
    for report in runs.tp(ranks.lone_wishes):
        assert report[f"{wish}-{rank}"] == [steps, saved, evaluated]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("learning_rate", ("0.001", "0.0001")),
        ("max_grad_norm", ("1.0", "0.5")),
        ("gradient_accumulation_steps", ("1", "2")),
        ("seed", ("1", "2")),
        ("save_steps", ("5", "6")),
        ("optim", ("SGD", "ADAMW_TORCH")),
    ],
)
def test_arguments_that_differ_are_refused(name, values, runs):
    first, second = (report[name] for report in runs.tp(ranks.lone_arguments))
    assert first == second
    assert first["type"] == "ConfigError"
    assert f"where:  {name}" in first["message"]
    for rank, value in enumerate(values):
        line = next(x for x in first["message"].splitlines() if f"rank {rank}:" in x)
        assert value in line


def test_a_lone_refusal_is_one_of_all(runs):
    first, second = (report["refused"] for report in runs.tp(ranks.lone_arguments))
    assert "rank 1 refused" in first["message"]
    assert "use_liger_kernel" in first["message"]
    assert "use_liger_kernel" in second["message"]


def test_arguments_of_ones_own_are_taken(runs):
    assert [report["own"]["type"] for report in runs.tp(ranks.lone_arguments)] == [None, None]


def test_timeout_reaches_groups_that_are_there_already(runs):
    for report in runs.tp(ranks.timeouts):
        assert report["unset"]
        assert report["set"] == [77.0]
        assert "ddp_timeout" in report["differing"]["message"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("values", "input_ids, tp rank 1: shape (2, 6)"),
        ("length", "input_ids, tp rank 1: shape (2, 6)"),
        ("evaluation", "different batches"),
        ("floats", "attention_mask, tp rank 1"),
        ("kinds", "rank 0: an evaluation forward"),
        ("generate", "rank 1: a training forward"),
    ],
)
def test_forwards_that_ranks_do_not_share_are_refused(case, words, runs):
    first, second = (report[case] for report in runs.tp(ranks.parted))
    assert first == second
    assert first["type"] == "BatchMismatchError"
    assert words in first["message"]


def test_and_the_ranks_go_on(runs):
    assert [report["same"]["type"] for report in runs.tp(ranks.parted)] == [None, None]
