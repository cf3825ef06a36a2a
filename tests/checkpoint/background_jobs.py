"""Rank functions: checkpoints that are written by a thread while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageReader, load
from transformers import AutoModelForCausalLM, TrainerCallback

from checkpoint import jobs
from hf_sp.checkpoint import shards
from hf_sp.integrations import trainer_files

DCP = {"checkpoint": "dcp"}


class Held(TrainerCallback):
    """What is there at the end of each step; files of a checkpoint wait for the step after it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.step = folder, [], threading.Condition()

    def on_step_end(self, args, state, control, **_):
        with self.step:
            self.seen.append(sorted(p.name for p in self.folder.glob("checkpoint-*")))
            self.step.notify_all()

    def wait(self, path: Path) -> None:
        number = next(int(part[11:]) for part in path.parts if part.startswith("checkpoint-"))
        with self.step:
            # No step follows the last one.
            assert self.step.wait_for(lambda: len(self.seen) > number or number == 4, timeout=60)


def trains(
    folder: str, kind: str, options: dict[str, Any], copies: bool = True, **kwargs: Any
) -> dict[str, Any]:
    """A run whose checkpoints are in their place a step later; by step, what is there.

    Without ``copies`` a thread writes what training has made of the tensors meanwhile.
    """
    run = Path(folder)
    copied = shards._copied if copies else lambda batch: dict(batch)
    with jobs.launched():
        trainer = jobs.trainer_of(run, kind, options={**options, **DCP}, **kwargs)
        held = Held(run)
        trainer.add_callback(held)
        write = shards._write

        def late(path: Path, batch: Any) -> None:
            held.wait(path)
            write(path, batch)

        with mock.patch.multiple(shards, _write=late, _copied=copied):
            trainer.train()
        seen = [*held.seen, sorted(p.name for p in run.glob("checkpoint-*"))]
        return {
            "history": jobs.history(trainer),
            "weights": jobs.weights(trainer.model),
            "seen": seen,
        }


def read_by_torch(folder: str, kind: str, options: dict[str, Any]) -> list[str]:
    """Names of weights that torch.distributed.checkpoint reads otherwise than a resumed run."""
    model, other = (jobs.model_of(kind, seed=seed, **options) for seed in (5, 6))
    with jobs.launched():
        trainer = jobs.trainer_of(Path(folder), kind, seed=5, options=options)
        trainer._load_from_checkpoint(f"{folder}/checkpoint-2", model)
    state = {n: p.detach() for n, p in other.named_parameters()}
    load(state, storage_reader=HuggingFaceStorageReader(f"{folder}/checkpoint-2/weights_shards"))
    pairs = zip(model.named_parameters(), state.items(), strict=True)
    return [n for (n, p), (_, x) in pairs if not torch.equal(jobs.whole(p), jobs.whole(x))]


def plain(folder: str, want: dict[str, torch.Tensor]) -> list[str]:
    """Names of weights that plain transformers loads otherwise."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = dict(model.named_parameters())
    assert set(found) == set(want)
    return [n for n, w in want.items() if not torch.equal(found[n], w)]


def fails(folder: str) -> dict[str, Any]:
    """The second rank cannot write its shards of the second checkpoint."""
    run = Path(folder)
    write = shards._write

    def full(path: Path, batch: Any) -> None:
        if dist.get_rank() == 1 and "checkpoint-2" in path.parts:
            raise OSError(28, "No space left on device", str(path))
        write(path, batch)

    with jobs.launched(), mock.patch.object(shards, "_write", full):
        trainer = jobs.trainer_of(run, options=DCP)
        text = jobs.refused(trainer.train)
        # Training has ended at the third; the next save is as good as any.
        trainer._save_checkpoint(trainer.model, None)
        trainer_files._finish(trainer)
    return {"text": text, "left": sorted(p.name for p in run.glob("checkpoint-*"))}
