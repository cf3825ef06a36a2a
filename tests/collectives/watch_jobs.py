"""Ranks that part, and ranks that fail; rank functions, for a pool of their own."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch.distributed as dist
from harness import batches
from harness.parity import Case, pair

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
