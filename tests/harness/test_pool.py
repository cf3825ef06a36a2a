"""The pool itself: results, seeds, failures, hangs, dead ranks, leftovers, rebuilding."""

from __future__ import annotations

import os

import pytest
import torch

from harness import pool_jobs
from harness.pool import Pool, RankError, _as_path, pool, run_on_ranks


@pytest.fixture
def ranks():
    """A pool of two that this test may break."""
    one = Pool(2)
    yield one
    one.close()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_in_rank_order_and_processes_persist():
    first = run_on_ranks(2, pool_jobs.rank_and_sum, value=3)
    second = run_on_ranks(2, pool_jobs.rank_and_sum, value=5)
    assert [row[0] for row in first] == [0, 1]
    assert [row[2] for row in first] == [6, 6]
    assert [row[2] for row in second] == [10, 10]
    assert [row[1] for row in first] == [row[1] for row in second] == pool(2).pids


def test_batch_returns_one_list_per_job():
    got = pool(2).run_batch(
        [(pool_jobs.rank_and_sum, {"value": 1}), (pool_jobs.echo, {"value": torch.zeros(2)})]
    )
    assert [row[2] for row in got[0]] == [2, 2]
    assert [row.tolist() for row in got[1]] == [[0.0, 0.0], [1.0, 1.0]]


def test_seeds_differ_between_ranks_and_repeat_between_jobs():
    first, second = (pool(2).run(pool_jobs.first_random) for _ in range(2))
    assert first == second
    assert first[0] != first[1]


def test_failure_shows_every_rank_and_rebuilds(ranks):
    before = [row[1] for row in ranks.run(pool_jobs.rank_and_sum, value=1)]
    with pytest.raises(RankError) as error:
        ranks.run(pool_jobs.raise_everywhere)
    assert "no luck on 0" in str(error.value)
    assert "no luck on 1" in str(error.value)
    assert not any(_alive(pid) for pid in before)
    after = [row[1] for row in ranks.run(pool_jobs.rank_and_sum, value=1)]
    assert not set(before) & set(after)
    assert ranks.starts == 2


def test_failure_of_one_rank_shows_where_its_peer_hangs(ranks):
    with pytest.raises(RankError) as error:
        ranks.run(pool_jobs.raise_on_last_while_others_wait)
    assert "the only one that knows" in str(error.value)
    assert "rank 0: no answer; its stack was" in str(error.value)
    assert "raise_on_last_while_others_wait" in str(error.value).split("--- rank 1")[0]


def test_hang_is_ended_at_the_limit_with_the_stack(ranks):
    ranks.run(pool_jobs.rank_and_sum, value=1)
    pids = ranks.pids
    with pytest.raises(RankError, match="sleep_on_first") as error:
        ranks.run(pool_jobs.sleep_on_first, timeout=1.0, seconds=60.0)
    assert "limit 1 s" in str(error.value)
    assert "pool_jobs.py" in str(error.value).split("--- rank 1")[0]
    assert not any(_alive(pid) for pid in pids)


def test_dead_rank_is_named_with_its_exit_code(ranks):
    with pytest.raises(RankError, match="rank 0: died, exit code 7"):
        ranks.run(pool_jobs.die_on_first)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (pool_jobs.leave_default_dtype, "default dtype left at"),
        (pool_jobs.leave_grad_off, "gradient mode left off"),
    ],
)
def test_leftover_state_fails_the_job(ranks, job, message):
    with pytest.raises(RankError, match=message):
        ranks.run(job)


def test_function_a_rank_cannot_import_is_refused():
    with pytest.raises(ValueError, match="top level"):
        _as_path(lambda: None)
