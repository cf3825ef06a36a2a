"""A checkpoint's large files, written by a thread while training goes on.

The main thread has copied what is to be written. Each rank's thread writes its own files and tells
the first rank so, through the store that the ranks met at: collectives are the training's. Knows
torch only.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hf_sp.checkpoint.ranks import UNTOUCHED, Ranks, Together
from hf_sp.comm.watch import seconds
from hf_sp.torch_private import default_store

_PAUSE_S = 0.05
_started = 0


class Writing:
    """One folder that is being written; ``started`` once its thread has taken over.

    Args:
        ranks: who writes.
        folder: where it will be, for messages.

    ``jobs`` write a file each, and return its path.
    """

    def __init__(self, ranks: Ranks, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        self.jobs: list[Callable[[], Path]] = []
        self.started = False
        self.error: Exception | None = RuntimeError("the thread that writes has ended early")
        self.aside: Path | None = None
        self.thread: threading.Thread | None = None

    def start(
        self,
        written: Sequence[str],
        digest: Callable[[str], Any],
        aside: Path,
        put: Callable[[dict[str, Any]], None],
    ) -> None:
        """Do the jobs from now on. On every rank, after what is written at once is there.

        Args:
            written: files that are there already.
            digest: of a file that is synced by that.
            aside: the folder that they are in.
            put: the folder in its place, given all digests; run by the first rank's thread.
        """
        global _started
        _started += 1
        store = default_store(f"hf_sp.writing.{_started}") if self.ranks.size > 1 else None
        arguments = (written if self.ranks.first else (), digest, aside, put, store)
        # No daemon: a script that ends waits for its last checkpoint.
        self.thread = threading.Thread(target=self._run, args=arguments, name="hf_sp.writing")
        self.started, self.aside = True, aside
        self.thread.start()

    def _run(
        self,
        written: Sequence[str],
        digest: Callable[[str], Any],
        aside: Path,
        put: Callable[[dict[str, Any]], None],
        store: Any,
    ) -> None:
        files: dict[str, Any] | None = None
        try:
            mine = [self.jobs.pop(0)().relative_to(aside).as_posix() for _ in list(self.jobs)]
            files = {name: digest(name) for name in (*mine, *written)}
            if self.ranks.first:
                self._hear(store, files)
                put(files)
            self.error = None
        except (OSError, SafetensorError, RuntimeError) as error:
            self.error, files = error, None
        finally:
            if store is not None and not self.ranks.first:
                store.set(str(self.ranks.rank), json.dumps(files))

    def _hear(self, store: Any, files: dict[str, Any]) -> None:
        """Add what the others have written."""
        patience = seconds("HF_SP_SAVE_TIMEOUT")
        for rank in map(str, range(1, self.ranks.size)):
            while not store.check([rank]):
                time.sleep(_PAUSE_S)
                # A main thread that has ended waits for this one, and perhaps for nobody.
                patience -= 0 if threading.main_thread().is_alive() else _PAUSE_S
                if patience < 0:
                    raise RuntimeError(f"rank {rank} has said nothing")
            told: Mapping[str, Any] | None = json.loads(store.get(rank))
            store.delete_key(rank)
            if told is None:
                raise RuntimeError(f"rank {rank} could not write")
            files.update(told)

    def finish(self) -> None:
        """Return when the folder is in its place. To be called on every rank.

        Raises:
            CheckpointError: on all ranks, if one could not write.
        """
        try:
            with Together(self.ranks, "a checkpoint could not be written", self.folder, UNTOUCHED):
                if self.thread is not None:
                    self.thread.join()
                if self.error is not None:
                    raise self.error
        finally:
            if self.ranks.first and self.aside is not None:
                shutil.rmtree(self.aside.parent, ignore_errors=True)
