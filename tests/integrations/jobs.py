"""Rank functions of the integration tests: one job, on one rank of a pool."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import warnings
from pathlib import Path

import torch.distributed as dist

from integrations import (
    accelerate_loop,
    checkpoints,
    evaluation,
    optimizer_state,
    ranks,
    refusals,
    training,
)
from integrations.scene import Scene, freeze_imports, launched

PLAIN = (
    training.train,
    training.variants,
    evaluation.evaluate,
    evaluation.best,
    checkpoints.resume,
    accelerate_loop.loop,
)
"""What one process does with the unmodified model, for comparison."""

JOBS = {
    job.__name__: job
    for job in (
        *PLAIN,
        accelerate_loop.loader_first,
        checkpoints.cross,
        checkpoints.dropout_resume,
        checkpoints.misuse,
        checkpoints.save,
        checkpoints.save_model,
        checkpoints.tampered,
        evaluation.whole_logits,
        optimizer_state.optimizer_state,
        ranks.lone_arguments,
        ranks.lone_wishes,
        ranks.parted,
        ranks.timeouts,
        refusals.agreeing,
        refusals.others,
        refusals.refusals,
        training.compiled,
    )
}


def on_rank(job: str, mode: str, out: str, **kwargs):
    """Run a job by its name; its report."""
    with scene_of(mode, out) as scene:
        return JOBS[job](scene, **kwargs)


@contextlib.contextmanager
def scene_of(mode: str, out: str):
    """This rank of a pool, as a process that torchrun has started."""
    random.seed(0)
    freeze_imports()
    rank, world = dist.get_rank(), dist.get_world_size()
    with launched(rank, world), _forking(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Scene(mode, Path(out), rank, world)


@contextlib.contextmanager
def _forking():
    """Loader workers are children, which a daemon cannot have, and forked in most processes.

    The ranks of a pool are spawned, and would spawn: six seconds of imports for each worker.
    """
    process, method = multiprocessing.current_process(), multiprocessing.get_start_method()
    process.daemon = False
    multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    finally:
        process.daemon = True
        multiprocessing.set_start_method(method, force=True)
