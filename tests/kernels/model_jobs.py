"""Rank functions: a whole model with the Triton kernels in it, in the interpreter."""

from __future__ import annotations

from unittest import mock

import torch
from harness import batches, tiny
from harness.compare import compare_gradients, compare_loss, gradients
from harness.parity import Case, pair
from harness.report import Report

from hf_sp.kernels import launch as dispatch
from kernels import interpreter


def step(family: str, sp: bool, dtype: str) -> tuple[Report, dict[str, int]]:
    """One step of both models: (report, launches of each kernel by the parallel one)."""
    with mock.patch.object(dispatch, "interpreter", interpreter.launch):
        case = Case(family, sp=sp, dtype=dtype)
        model, parallel = pair(case)
        report = Report(str(case), torch.distributed.get_rank(), dtype)
        batch = batches.plain(2, 9, model.config.vocab_size)
        dispatch.launches.clear()
        loss = parallel(**batch).loss
        loss.backward()
        launches = dict(dispatch.launches)
        wanted = tiny.reference(model)(**batch).loss
        wanted.backward()
    compare_loss(report, loss, wanted)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report, launches
