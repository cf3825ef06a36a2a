"""Ranks that part, and ranks that fail; rank functions, for a pool of their own."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from harness import batches
from harness.parity import Case, pair

from hf_sp import gloo
from hf_sp.comm import watch


def _say_to(folder: str) -> None:
    sys.stderr = (Path(folder) / f"{dist.get_rank()}").open("w")


def survives(folder: str) -> None:
    """Rank 1 goes on to the next batch, as after an error that it alone has met and caught."""
    _say_to(folder)
    _, model = pair(Case("llama"))
    loss = model(**batches.plain()).loss
    if dist.get_rank() == 1:
        model(**batches.plain())
    loss.backward()


def fails(folder: str, silent: bool) -> None:
    """Rank 1 ends, by an error or without a word; rank 0 loses its connection."""
    _say_to(folder)
    watch.watch()
    error = RuntimeError("Connection closed by peer [127.0.0.1]:1"), MemoryError("no more\nof it")
    mine = error[dist.get_rank()]
    dist.barrier()
    if not (silent and dist.get_rank() == 1):
        sys.excepthook(type(mine), mine, None)
    dist.barrier()
    sys.stderr.flush()


def watched_all_the_time() -> bool:
    """Whether a thread looks at this rank."""
    watch.PERIOD_S = 1e-4
    watch.watch()
    return any(thread.name == "hf_sp.watch" for thread in threading.enumerate())


def held_by_gloo() -> tuple[bool, bool]:
    """Whether gloo's thread holds a tensor of a finished collective: before `finish`, and after.

    Of rank 0, where it waits for the interpreter's lock, which this thread keeps, as at exit.
    """
    if dist.get_rank() == 1:
        time.sleep(0.5)  # or rank 0's thread may be through before it has begun to keep the lock
    mine = torch.ones(2)
    kept = weakref.ref(mine)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    dist.all_gather([torch.empty(2) for _ in range(2)], mine, async_op=True)
    del mine
    until = time.monotonic() + 1.5
    while dist.get_rank() == 0 and time.monotonic() < until:
        pass
    before = kept() is not None
    gloo.finish()
    sys.setswitchinterval(interval)
    return before, kept() is not None
