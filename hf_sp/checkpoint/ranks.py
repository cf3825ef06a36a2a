"""Ranks that write and read files together: who is here, and that they fail together.

Must not know what is in the files.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from hf_sp.errors import CheckpointError, HfSpError
from hf_sp.state import parallel_state
from hf_sp.torch_private import default_store

logger = logging.getLogger(__name__)

_WARN_SECONDS = 10.0
_LISTED = 8
"""Problems listed in full in one message."""

T = TypeVar("T")


def listing(problems: Iterable[str]) -> str:
    """The first few problems, one a line, and how many more there are."""
    lines = list(problems)
    more = len(lines) - _LISTED
    return "\n".join(lines[:_LISTED] + ([f"and {more} more"] if more > 0 else []))


@dataclass(frozen=True)
class Ranks:
    """The ranks that hold parts of one model; one rank without a group for any other model."""

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes what one rank has to write."""
        return self.rank == 0

    def tell(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, value, group=self.group)
        return told


def ranks_of(model: nn.Module) -> Ranks:
    """The ranks of a parallelized model; all there are, of another one made of DTensors."""
    state = parallel_state(model)
    if state is not None:
        one = state.everyone.size == 1
        return Ranks() if one else Ranks(state.all_ranks, state.everyone.size, state.everyone.rank)
    spread = dist.is_initialized() and any(isinstance(p, DTensor) for p in model.parameters())
    return Ranks(None, dist.get_world_size(), dist.get_rank()) if spread else Ranks()


class Together:
    """What fails on one rank inside the block raises on all of them at its end.

    The block must run the same collectives on every rank whatever fails. Not for a rank that dies:
    the others learn of that from the next collective.

    Args:
        ranks: the ranks that run the block.
        what: one sentence, what could not be done.
        where: file or folder.
        remedy: what to do about it.

    Raises:
        CheckpointError: naming the ranks and their errors. A refusal of ours stays what it is.
    """

    def __init__(self, ranks: Ranks, what: str, where: Any, remedy: str = "") -> None:
        self.ranks, self.what, self.where, self.remedy = ranks, what, str(where), remedy

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, dist.DistError) or not isinstance(error, Exception | None):
            return
        text = error and f"{type(error).__name__}: {error}"
        told = self.ranks.gather(text)
        if isinstance(error, HfSpError) or not any(told):
            return
        raise CheckpointError(
            self.what,
            where=self.where,
            got=listing(f"rank {rank}: {text}" for rank, text in enumerate(told) if text),
            rule="all ranks succeed, or all fail",
            remedy=self.remedy,
        ) from error


_meetings: dict[str, int] = {}


def meet(group: dist.ProcessGroup | None, what: str) -> None:
    """Return when every rank of the group has called this; raise on its first rank if some do not.

    The usual mistake is ``if rank == 0: model.save_pretrained(...)``, which would hang in the first
    gather. A rank's presence is written to the rendezvous store, which needs no partner.

    Args:
        group: the ranks that must come, None for all.
        what: the call, as the user wrote it.

    Raises:
        CheckpointError: on the group's first rank, which is the one that is called alone by
            mistake; after ``HF_SP_SAVE_TIMEOUT`` seconds (180). The others wait as long as the
            process group would: the first rank may well have something to do before it comes.
            The call does not count then: the next one can succeed.
    """
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1 or dist.get_backend(group) == "fake":
        return
    store = default_store()
    rank = dist.get_rank()
    name = f"hf_sp/{what}/{ranks[0]}-{ranks[-1]}"
    count = _meetings.get(name, 0) + 1
    mine = f"{name}/{count}/{rank}"
    store.set(mine, "here")
    patience = float(os.environ.get("HF_SP_SAVE_TIMEOUT", "180")) if rank == ranks[0] else 1800.0
    started, pause, warned = time.monotonic(), 0.001, False
    absent = [r for r in ranks if r != rank]
    while True:
        absent = [r for r in absent if not store.check([f"{name}/{count}/{r}"])]
        if not absent:
            _meetings[name] = count
            # Whoever is here has left the meeting before.
            store.delete_key(f"{name}/{count - 1}/{rank}")
            return
        waited = time.monotonic() - started
        if waited > patience:
            store.delete_key(mine)
            raise CheckpointError(
                f"{what} was called on some ranks only",
                where=f"rank {rank}",
                got=f"no call from ranks {absent} within {waited:.0f} s",
                rule="the weights are sharded: every rank has a part of what is written",
                remedy=f"call {what} on every rank, outside of any 'if rank == 0' or "
                "'if is_main_process'; only one rank writes the files. "
                "HF_SP_SAVE_TIMEOUT sets the seconds to wait.",
            )
        if waited > _WARN_SECONDS and not warned:
            warned = True
            text = "%s on rank %d waits for ranks %s: it has to be called on every rank"
            logger.warning(text, what, rank, absent)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
