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
    groups,
    groups_trl,
    optimizer_state,
    ranks,
    refusals,
    training,
)
from integrations.scene import Scene, launched


def name_of(job):
    """The module and the name of a job."""
    return f"{job.__module__.rpartition('.')[2]}.{job.__name__}"


PLAIN = (
    training.train,
    training.variants,
    evaluation.evaluate,
    evaluation.best,
    checkpoints.resume,
    accelerate_loop.loop,
)
"""What one process does with the unmodified model, for comparison."""

GROUPED = (
    groups.train,
    groups.evaluate,
    groups.resume,
    groups.lora,
    groups.long,
    groups.experts,
    groups.policies,
    groups.faults,
    groups.loop,
    groups_trl.train,
)
"""Likewise, with the batches of two groups."""

JOBS = {
    name_of(job): job
    for job in (
        *PLAIN,
        *GROUPED,
        groups.cross,
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


def on_rank(
    job: str, mode: str, out: str, groups: int = 1, replicas: int = 1, cp: int = 1, **kwargs
):
    """Run a job by its name; its report."""
    with scene_of(mode, out, groups, replicas, cp) as scene:
        return JOBS[job](scene, **kwargs)


@contextlib.contextmanager
def scene_of(mode: str, out: str, groups: int = 1, replicas: int = 1, cp: int = 1):
    """This rank of a pool, as a process that torchrun has started."""
    random.seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    with launched(rank, world), _forking(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Scene(mode, Path(out), rank, world, groups, replicas, cp)


@contextlib.contextmanager
def _forking():
    """Loader workers are children, which a daemon cannot have, and forked in most processes.

    The ranks of a pool would ask its server for them.
    """
    process, method = multiprocessing.current_process(), multiprocessing.get_start_method()
    process.daemon = False
    multiprocessing.set_start_method("fork", force=True)
    try:
        yield
    finally:
        process.daemon = True
        multiprocessing.set_start_method(method, force=True)
