"""Ranks that outlive the families they check, and are started anew when one does not answer."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


class Ranks:
    """``count`` processes with torch.distributed over gloo; ``ask`` runs a function on each."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.processes: list[Any] = []
        self.connections: list[Connection] = []

    def ask(self, function: str, argument: str, seconds: float) -> list[Any]:
        """Each rank's ``(result, error text)``; the text says so where there was no answer."""
        if not self.processes:
            self._start()
        for connection in self.connections:
            connection.send((function, argument))
        answers: list[Any] = [(None, "no answer")] * self.count
        waiting = dict(zip(self.connections, range(self.count), strict=True))
        deadline = time.monotonic() + seconds
        while waiting and time.monotonic() < deadline:
            for connection in wait(list(waiting), deadline - time.monotonic()):
                try:
                    answers[waiting.pop(connection)] = connection.recv()
                except EOFError:
                    answers[waiting.pop(connection, 0)] = (None, "died")
                # The others may hang in a collective.
                deadline = min(deadline, time.monotonic() + 5)
        if any(error for _, error in answers):
            # Ranks may be out of step.
            self.close()
        return answers

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            arguments = (rank, self.count, store, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)

    def close(self) -> None:
        """End the ranks."""
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.kill()
            process.join()
            connection.close()
        self.processes, self.connections = [], []


def _serve(rank: int, count: int, store: str, connection: Connection) -> None:
    import torch
    import torch.distributed as dist
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    files = dist.FileStore(store, count)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=count)
    while True:
        path, argument = connection.recv()
        module, _, name = path.partition(":")
        try:
            answer = getattr(importlib.import_module(module), name)(argument), ""
        except Exception:  # the boundary of the process
            answer = None, traceback.format_exc()
        connection.send(answer)
