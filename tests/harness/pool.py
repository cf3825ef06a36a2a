"""Persistent gloo ranks: forked once a test run, fed with functions, rebuilt after a failure.

Owns: processes, rendezvous (a FileStore: no ports, no retries), timeouts, tracebacks of every rank.
Must not know: models; of hf_sp only that it is imported first.

    from harness.pool import pool, run_on_ranks
    results = pool(2).run(harness.parity.train, case=case)           # a list, one result per rank
    results = run_on_ranks(4, my_module_level_function, x=3)         # the same thing
    first, second = pool(2).run_batch([(f, dict(x=1)), (g, dict(y=2))])

The function runs on every rank with `torch.distributed` initialised (world = the pool's size) and
gets no rank argument. Arguments and results are pickled. `torch.manual_seed(1000 + rank)` precedes
every job: seeds differ per rank on purpose, since a replica that depends on its own RNG is a fault
no loss can show.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from frozen import freeze_imports

TIMEOUT_S = 120.0
# Once a rank has failed its peers usually hang in a collective: how long to wait for their own
# error.
GRACE_S = 3.0
# The first rank of a run waits for the imports; other processes may be importing on two cores.
START_S = 180.0
# What ranks are forked with, instead of importing it anew each (4 s): one thread, and no state.
PRELOADED = ["hf_sp", "harness.pool"]


class RankError(AssertionError):
    """A job failed, died or hung on at least one rank.

    The message holds what every rank was doing.
    """


@dataclass(frozen=True)
class Answer:
    """What a rank sends back: a result, or its traceback."""

    ok: bool
    value: Any


def pool(world: int) -> Pool:
    """The pool of `world` ranks of this test run, started on first use."""
    if world not in _POOLS:
        _POOLS[world] = Pool(world)
    return _POOLS[world]


def run_on_ranks(world: int, fn: Callable, *, timeout: float = TIMEOUT_S, **kwargs: Any) -> list:
    """Run `fn(**kwargs)` on each of `world` ranks; the results in rank order."""
    return pool(world).run(fn, timeout=timeout, **kwargs)


@functools.cache
def _outcome(
    world: int, fn: Callable, timeout: float, kwargs: tuple
) -> tuple[list | None, str | None]:
    try:
        return run_on_ranks(world, fn, timeout=timeout, **dict(kwargs)), None
    except RankError as error:
        return None, str(error)


def run_once(world: int, fn: Callable, *, timeout: float = TIMEOUT_S, **kwargs: Any) -> list:
    """`run_on_ranks`, once a session for the same arguments (hashable): many tests, one job.

    A failure is kept and raised for each of them; running into the same limit again tells nothing.
    """
    results, failure = _outcome(world, fn, timeout, tuple(sorted(kwargs.items())))
    if failure is not None:
        raise RankError(failure)
    return results


def close_all() -> None:
    """End every pool of this process."""
    for one in _POOLS.values():
        one.close()
    _POOLS.clear()


class Pool:
    """`world` spawned ranks that outlive the jobs they run."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.starts = 0
        self._ranks: list[_Rank] = []
        self._dir: tempfile.TemporaryDirectory | None = None

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks that are up (empty before the first job and after a failure)."""
        return [rank.process.pid for rank in self._ranks]

    def run(self, fn: Callable, *, timeout: float = TIMEOUT_S, **kwargs: Any) -> list:
        """Run one job; the list of results in rank order. Raises RankError."""
        return self.run_batch([(fn, kwargs)], timeout=timeout)[0]

    def run_batch(
        self, jobs: Sequence[tuple[Callable, dict]], *, timeout: float = TIMEOUT_S
    ) -> list[list]:
        """Run jobs one after another, `timeout` seconds for each; per job the results by rank.

        The first job that fails ends the batch: the ranks are ended too, and the next call starts
        new ones.
        """
        if not self._ranks:
            self._start()
        return [self._run_one(_as_path(fn), kwargs, timeout) for fn, kwargs in jobs]

    def close(self) -> None:
        """End the ranks.

        Ask, then kill those that don't answer. Only processes this pool spawned.
        """
        for rank in self._ranks:
            with contextlib.suppress(OSError):
                rank.connection.send_bytes(pickle.dumps(None))
        deadline = time.monotonic() + GRACE_S
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _run_one(self, path: str, kwargs: dict, timeout: float) -> list:
        payload = pickle.dumps((path, kwargs, sys.path))
        for rank in self._ranks:
            # A rank that died between two jobs is reported by _collect, with its exit code.
            with contextlib.suppress(OSError):
                rank.connection.send_bytes(payload)
        answers = self._collect(timeout)
        if all(answer is not None and answer.ok for answer in answers):
            return [answer.value for answer in answers]
        report = self._report(path, answers, timeout)
        self._kill()
        raise RankError(report)

    def _start(self) -> None:
        self.starts += 1
        self._dir = tempfile.TemporaryDirectory(prefix="hf_sp_pool_", ignore_cleanup_errors=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with _environment(
            OMP_NUM_THREADS="1",
            TRANSFORMERS_VERBOSITY="error",
            TOKENIZERS_PARALLELISM="false",
            PYTHONPATH=os.pathsep.join(sys.path),
        ):
            environment = dict(os.environ)
            for index in range(self.world):
                ours, theirs = context.Pipe()
                stacks = Path(self._dir.name) / f"stacks_{index}.txt"
                process = context.Process(
                    target=_serve,
                    args=(index, self.world, self._dir.name, str(stacks), environment, theirs),
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._ranks.append(_Rank(process, ours, stacks))
        answers = self._collect(START_S)
        if not all(answer is not None and answer.ok for answer in answers):
            report = self._report("(start)", answers, START_S)
            self._kill()
            raise RankError(report)

    def _collect(self, timeout: float) -> list[Answer | None]:
        """Each rank's answer; None where it died or did not answer in time."""
        answers: list[Answer | None] = [None] * self.world
        waiting = {rank.connection: index for index, rank in enumerate(self._ranks)}
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for connection in wait(list(waiting), max(0.0, deadline - time.monotonic())):
                index = waiting.pop(connection)
                try:
                    answers[index] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    answers[index] = None
                if answers[index] is None or not answers[index].ok:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _report(self, path: str, answers: list[Answer | None], timeout: float) -> str:
        silent = [rank for rank, a in zip(self._ranks, answers, strict=True) if a is None]
        for rank in silent:
            # One that has just died is still alive to its parent, the server.
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid, signal.SIGUSR1)
        if silent:
            # faulthandler writes from the signal handler; there is nothing to wait on
            time.sleep(0.5)
        failed = [i for i, a in enumerate(answers) if a is None or not a.ok]
        lines = [f"{path} failed on ranks {failed} of {self.world} (limit {timeout:g} s)"]
        for index, (rank, answer) in enumerate(zip(self._ranks, answers, strict=True)):
            if answer is not None:
                text = "finished" if answer.ok else answer.value
            elif rank.process.is_alive():
                text = "no answer; its stack was:\n" + rank.stacks.read_text()
            else:
                rank.process.join(1.0)
                text = f"died, exit code {rank.process.exitcode}\n" + rank.stacks.read_text()
            lines.append(f"--- rank {index}: {text.rstrip()}")
        return "\n".join(lines)

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.process.is_alive():
                rank.process.kill()
            rank.process.join()
            rank.connection.close()
        self._ranks = []
        if self._dir is not None:
            self._dir.cleanup()
            self._dir = None


@dataclass(frozen=True)
class _Rank:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    stacks: Path


_POOLS: dict[int, Pool] = {}
atexit.register(close_all)


@contextlib.contextmanager
def _environment(**values: str):
    """Environment variables for processes spawned inside the block; ours are put back after."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _as_path(fn: Callable) -> str:
    """`module:function` of a module-level function.

    Raises ValueError for what a rank could not import.
    """
    if fn.__module__ == "__main__" or "." in fn.__qualname__:
        raise ValueError(
            f"rank function {fn.__module__}:{fn.__qualname__} is not at the top level of a module"
        )
    return f"{fn.__module__}:{fn.__qualname__}"


# -------------------------------------------------------------------------------------------------
# The rank's side
# -------------------------------------------------------------------------------------------------


def _serve(
    rank: int,
    world: int,
    folder: str,
    stacks: str,
    environment: dict[str, str],
    connection: Connection,
) -> None:
    """Main of a rank.

    Initialise once, then answer jobs until told to stop or until the parent is gone.
    """
    # The server that forked it has the variables of its own start.
    os.environ.clear()
    os.environ.update(environment)
    # The parent decides about Ctrl-C; a rank that stops by itself would leave its peers in a
    # collective.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stacks_file = Path(stacks).open("w")  # noqa: SIM115 (held open for the life of the process)
    faulthandler.register(signal.SIGUSR1, file=stacks_file, all_threads=True)
    # A crash in native code leaves the stacks of its threads there.
    faulthandler.enable(stacks_file, all_threads=True)
    try:
        import torch
        import torch.distributed as dist

        import hf_sp  # noqa: F401 (before there are process groups: torch's heap is at stake)

        torch.set_num_threads(1)
        store = dist.FileStore(str(Path(folder) / "rendezvous"), world)
        # Longer than any job: a hang is the parent's to report, with stacks.
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30)
        )
        dist.barrier()
        answer = Answer(True, None)
    except Exception:  # the boundary of the process: whatever it was goes to the parent as text
        answer = Answer(False, traceback.format_exc())
    sequence = 0
    while True:
        try:
            connection.send_bytes(pickle.dumps(answer))
            message = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        if message is None:
            dist.destroy_process_group()
            # Or the interpreter's own teardown skips what is frozen, and triton reports leaks.
            gc.unfreeze()
            return
        sequence += 1
        answer = _answer(*message, rank=rank, world=world, sequence=sequence)


def _answer(
    path: str, kwargs: dict, search_path: list[str], *, rank: int, world: int, sequence: int
) -> Answer:
    import torch

    sys.path.extend(entry for entry in search_path if entry not in sys.path)
    freeze_imports()
    try:
        module, name = path.split(":")
        function = getattr(importlib.import_module(module), name)
        torch.manual_seed(1000 + rank)
        value = function(**kwargs)
        gc.collect()
        _check_clean(world, sequence)
        pickle.dumps(value)
        return Answer(True, value)
    except Exception:  # the boundary of the process: whatever it was goes to the parent as text
        return Answer(False, traceback.format_exc())


def _check_clean(world: int, sequence: int) -> None:
    """Raise AssertionError if the job left state behind that would change the next one."""
    import torch
    import torch.distributed as dist

    assert torch.get_default_dtype() == torch.float32, (
        f"default dtype left at {torch.get_default_dtype()}"
    )
    assert torch.is_grad_enabled(), "gradient mode left off"
    assert not torch.is_inference_mode_enabled(), "inference mode left on"
    assert not torch.is_autocast_enabled("cpu"), "autocast left on"
    assert not torch.are_deterministic_algorithms_enabled(), "deterministic algorithms left on"
    assert torch.get_num_threads() == 1, f"torch threads left at {torch.get_num_threads()}"
    assert dist.is_initialized(), "the default process group was destroyed"
    assert dist.get_world_size() == world, "the default process group was replaced"
    # Ranks that issued different collectives meet here out of step: a wrong number, or a hang with
    # stacks.
    seen = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    dist.all_gather(seen, torch.tensor([sequence]))
    assert [int(one) for one in seen] == [sequence] * world, (
        f"ranks are out of step: {[int(one) for one in seen]}"
    )
