"""Ranks that wait for each other in different calls end within a minute, and say where they were.

A thread of each rank looks at its main thread. While that waits for a collective and stands still,
the rank tells the others so, through the store that they met at; a run that goes on sends nothing.
Once all of them have stood still for ``HF_SP_HANG_SECONDS`` (30; 0: never), at different lines or
after different numbers of collectives, none can ever go on: each prints where all are, and ends.
A rank that loads, compiles, writes or sleeps is waited for, for as long as the process group does.
A rank that fails says why, so that the others, who only lose their connection, can name the cause.

Must not know modules, plans or models. Collectives: none.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import linecache
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from hf_sp.errors import ConfigError
from hf_sp.torch_private import collectives_launched, default_store

PERIOD_S = 1.0
GRACE_S = 3.0
"""How long who ends waits for what the others have to say."""

_TORCH = str(Path(torch.__file__).parent) + os.sep
_HF_SP = str(Path(__file__).parents[1]) + os.sep
# Where a host waits for other ranks. Not where torch writes: a slow disk is no other rank's fault.
_WAITS = (
    f"{_TORCH}distributed{os.sep}",
    f"{_HF_SP}comm{os.sep}",
    f"{_HF_SP}checkpoint{os.sep}ranks",
)
_WRITES = f"{_TORCH}distributed{os.sep}checkpoint{os.sep}"
_CALLS_OPERATORS = f"{_TORCH}_ops.py"


@dataclass(frozen=True)
class Report:
    """What a rank tells the others.

    Args:
        waiting: seconds for which its main thread has stood still in a collective.
        launched: collectives so far, of all process groups.
        where: the line outside torch and hf_sp at which it stands; else what has become of it.
        failed: the error that ended it.
    """

    waiting: float = 0.0
    launched: int = 0
    where: str = ""
    failed: str = ""

    def __str__(self) -> str:
        waits = f"waits in its collective {self.launched}, at " if self.waiting else ""
        return self.failed or waits + self.where


def parted(reports: Sequence[Report], limit: float) -> bool:
    """Whether ranks wait for each other in vain: all wait, and not in the same call."""
    places = {(report.launched, report.where) for report in reports}
    return all(report.waiting >= limit for report in reports) and len(places) > 1


def waits(frame: FrameType | None) -> bool:
    """Whether a thread is where a rank waits for others."""
    while frame is not None and frame.f_code.co_filename == _CALLS_OPERATORS:
        frame = frame.f_back
    file = frame.f_code.co_filename if frame is not None else ""
    return file.startswith(_WAITS) and not file.startswith(_WRITES)


def callers(frame: FrameType | None) -> list[FrameType]:
    """The frames of a thread outside torch and hf_sp, innermost first."""
    found: list[FrameType] = []
    while frame is not None:
        if found or not frame.f_code.co_filename.startswith((_TORCH, _HF_SP)):
            found.append(frame)
        frame = frame.f_back
    return found


def line(frame: FrameType) -> str:
    """Where a frame is, and the text of that line."""
    name, number = frame.f_code.co_filename, frame.f_lineno
    return f"{name}:{number} ({linecache.getline(name, number).strip()})"


def look() -> tuple[bool, str, list[tuple[int, int]]]:
    """Whether the main thread waits for other ranks, at which line, and its callers' places.

    Frames are let go at once: what their variables hold would live on with them.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = callers(frame)
    if not frames or not waits(frame):
        return False, "", []
    return True, line(frames[0]), [(id(f.f_code), f.f_lasti) for f in frames]


TIMES = {"HF_SP_HANG_SECONDS": 30.0, "HF_SP_SAVE_TIMEOUT": 180.0}
"""Environment variables, and what they are if they are not set."""


def seconds(variable: str) -> float:
    """A time from the environment.

    Raises:
        ConfigError: it is no number.
    """
    text = os.environ.get(variable, "")
    try:
        return float(text or TIMES[variable])
    except ValueError:
        raise ConfigError(
            f"{variable} is no number of seconds",
            where="the environment, of every rank",
            got=repr(text),
            legal=f"a number, {TIMES[variable]:g} if it is not set",
        ) from None


def watch() -> None:
    """Watch this process and its peers from now on; once for each time torch.distributed starts."""
    global _current
    limit = seconds("HF_SP_HANG_SECONDS")
    if limit <= 0 or dist.get_world_size() == 1 or dist.get_backend() == "fake":
        return
    if _current is None:
        _tell_of_ends()
    if _current is None or _current.world is not dist.group.WORLD:
        _current = Watch(limit)
        _current.thread.start()


_current: Watch | None = None


def _tell_of_ends() -> None:
    """Tell why, or that, this process ends."""
    before = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        before(kind, error, trace)
        if _current is not None and dist.is_initialized():
            _current.fail(kind, error)

    def at_the_end() -> None:
        if _current is None:
            return
        if dist.is_initialized() and not _current.told:
            with contextlib.suppress(RuntimeError):
                _current.tell(Report(where="has come to the end of its script"))
        _current.stop()

    sys.excepthook = excepthook
    atexit.register(at_the_end)


class Watch:
    """One rank's watch over its main thread, and what it has heard of the others."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.world = dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # Of its own, so that a main thread that waits at the store does not keep it.
        self.store = default_store("hf_sp.watch")
        self.told = False
        self.over = False
        self.wake = threading.Event()
        self.thread = threading.Thread(target=self.run, name="hf_sp.watch", daemon=True)

    def run(self) -> None:
        """Look every second, until the process group is gone."""
        still, since = None, time.monotonic()
        while not self.over and dist.is_initialized() and dist.group.WORLD is self.world:
            waits_now, where, stack = look()
            now = (launched := collectives_launched()), stack
            if now != still or not waits_now:
                still, since = now, time.monotonic()
            waiting = time.monotonic() - since
            try:
                if waiting >= self.limit / 2:
                    self.tell(Report(waiting, launched, where))
                    self.judge()
                elif self.told:
                    self.tell(Report())
            except RuntimeError:  # the store ended with the rank that holds it
                return
            self.wake.wait(PERIOD_S)

    def stop(self) -> None:
        """End the thread: inside torch when the interpreter goes, it would abort the process."""
        self.over = True
        self.wake.set()
        self.thread.join(GRACE_S)

    def tell(self, report: Report) -> None:
        """Let the others know."""
        self.told = report != Report()
        self.store.set(str(self.rank), json.dumps(asdict(report)))

    def heard(self) -> list[Report]:
        """The latest report of every rank, in rank order; empty ones of those that told nothing."""
        keys = [str(rank) for rank in range(self.size)]
        known = [k if self.store.check([k]) else None for k in keys]
        return [Report() if k is None else Report(**json.loads(self.store.get(k))) for k in known]

    def judge(self) -> None:
        """End this process if no rank can go on."""
        reports = self.heard()
        if any(report.failed for report in reports):
            self.say("another rank has failed", reports)
        elif parted(reports, self.limit):
            self.say("the ranks wait for each other in different calls, for ever", reports)
        else:
            return
        self.over = True
        # Not before the others have come to see it, too.
        time.sleep(GRACE_S)
        # The main thread waits inside torch, where no exception reaches it.
        os._exit(1)

    def fail(self, kind: type[BaseException], error: BaseException) -> None:
        """Tell why this rank ends; who has lost its connection prints why another one did."""
        if self.over:
            return
        self.over = True
        text = next(iter(str(error).splitlines()), "")[:300]
        try:
            if not isinstance(error, RuntimeError) or "onnection" not in text:
                self.tell(Report(failed=f"{kind.__name__}: {text}"))
                return
            self.tell(Report(where="lost its connection"))
            deadline = time.monotonic() + GRACE_S
            reports = self.heard()
            while time.monotonic() < deadline and not any(r.failed for r in reports):
                time.sleep(0.1)
                reports = self.heard()
            if not any(report.failed for report in reports):
                gone = Report(where="has said nothing: killed, or out of memory?")
                reports = [gone if report == Report() else report for report in reports]
            self.say("another rank has ended", reports)
        except RuntimeError:  # the store ended with the rank that holds it
            self.say("another rank has ended", [Report(where="is gone, and the store with it")])

    def say(self, what: str, reports: Sequence[Report]) -> None:
        """Print what is known of each rank."""
        lines = [f"  rank {i}: {report}" for i, report in enumerate(reports) if report != Report()]
        text = [f"[hf_sp, rank {self.rank}] {what}:", *lines]
        sys.stderr.write("\n".join(text) + "\n")
        sys.stderr.flush()
