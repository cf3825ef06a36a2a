"""Ranks that wait for each other in vain end, and say where they were; no others do."""

from __future__ import annotations

import gc
import pickle
import threading
import time
import weakref

import pytest
from harness.pool import Pool, RankError

from collectives import watch_jobs
from hf_sp.comm import watch
from hf_sp.comm.watch import Report, parted

LIMIT = 30
HERE, THERE = Report(31, 7, "here"), Report(31, 7, "there")


@pytest.mark.parametrize(
    ("reports", "vain"),
    [
        ([HERE, THERE], True),
        ([HERE, Report(31, 8, "here")], True),  # one is a collective ahead
        ([HERE, HERE], False),  # a slow network
        ([HERE, Report(29, 7, "there")], False),
        ([HERE, Report()], False),  # it loads data, compiles, writes
        ([HERE, THERE, Report()], False),
        ([HERE, HERE, THERE], True),
    ],
)
def test_who_waits_in_vain(reports, vain):
    assert parted(reports, LIMIT) is vain


@pytest.mark.parametrize(
    ("file", "waiting"),
    [
        (watch._TORCH + "distributed/distributed_c10d.py", True),
        (watch._TORCH + "distributed/checkpoint/filesystem.py", False),
        (watch._TORCH + "serialization.py", False),
        (watch._HF_SP + "comm/calls.py", True),
        (watch._HF_SP + "checkpoint/ranks.py", True),
        (watch._HF_SP + "checkpoint/folder.py", False),
        ("/somewhere/train.py", False),
    ],
)
def test_where_a_rank_waits(file, waiting):
    """By the innermost frame, but for torch's own call of an operator."""
    scope: dict = {}
    exec(compile("import sys\ndef f(g=sys._getframe): return g()", file, "exec"), scope)
    assert watch.waits(scope["f"]()) is waiting
    operator = "def op(f): return f()"
    exec(compile("import sys\ndef f(call): return call(sys._getframe)", file, "exec"), scope)
    exec(compile(operator, watch._CALLS_OPERATORS, "exec"), scope)
    assert watch.waits(scope["f"](scope["op"])) is waiting


def test_what_it_looks_at_does_not_live_on():
    """Tensors in the variables of a forward, for one: until the next look, a second later."""

    class Held:
        pass

    def forward():
        held = Held()
        thread = threading.Thread(target=watch.look)
        thread.start()
        thread.join()
        return weakref.ref(held)

    gc.disable()
    try:
        assert forward()() is None
    finally:
        gc.enable()


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setenv("HF_SP_HANG_SECONDS", "4")
    pool = Pool(2)
    yield pool
    pool.close()


def test_an_error_that_one_rank_survives(ranks, tmp_path):
    started = time.monotonic()
    with pytest.raises(RankError, match="died, exit code 1"):
        ranks.run(watch_jobs.survives, folder=str(tmp_path))
    assert time.monotonic() - started < 60
    for rank in "01":
        said = (tmp_path / rank).read_text()
        assert f"[hf_sp, rank {rank}] the ranks wait for each other in different calls" in said
        lines = said.splitlines()
        assert "loss.backward()" in next(x for x in lines if x.startswith("  rank 0:"))
        assert "model(**batches" in next(x for x in lines if x.startswith("  rank 1:"))


@pytest.mark.parametrize(
    ("silent", "word"),
    [(False, "rank 1: MemoryError: no more"), (True, "rank 1: has said nothing: killed")],
)
def test_the_others_are_told_who_failed(silent, word, ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_SP_HANG_SECONDS", "300")
    ranks.run(watch_jobs.fails, folder=str(tmp_path), silent=silent)
    assert (
        f"another rank has ended:\n  rank 0: lost its connection\n  {word}"
        in (tmp_path / "0").read_text()
    )
    assert "[hf_sp" not in (tmp_path / "1").read_text()


def test_the_thread_ends_before_the_interpreter(ranks):
    """In a call of torch's it would abort the process, in about every third one at this pace."""
    assert ranks.run(watch_jobs.watched_all_the_time) == [True, True]
    for rank in ranks._ranks:
        rank.connection.send_bytes(pickle.dumps(None))
    for rank in ranks._ranks:
        rank.process.join(60)
        assert rank.process.exitcode == 0


def test_gloo_lets_go_before_the_interpreter_ends(ranks):
    assert ranks.run(watch_jobs.held_by_gloo)[0] == (True, False)


def test_one_process_is_not_watched():
    assert "hf_sp.watch" not in [thread.name for thread in threading.enumerate()]
