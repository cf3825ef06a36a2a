"""Compiled decoder layers; rank functions, for a pool."""

from __future__ import annotations

import torch
import torch.distributed as dist
from harness import batches
from harness.compare import compare_gradients, fresh, gradients
from harness.parity import Case, pair
from harness.report import Report
from torch._dynamo.testing import CompileCounterWithBackend


def lengths(case: Case, count: int, backend: str = "aot_eager") -> tuple[Report, int]:
    """Batches of ``count`` lengths, as the unsharded model has them; and the graphs of a layer."""
    report = Report(str(case), dist.get_rank(), case.dtype)
    want, got = pair(case)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    for layer in got.model.layers:
        layer.compile(fullgraph=True, backend=counter)
    for step, batch in enumerate(batches.micro_batches(count, want.config.vocab_size, seed=3)):
        losses = []
        for model in (want, got):
            model.zero_grad()
            loss = model(**fresh(batch)).loss
            loss.backward()
            losses.append(loss.detach())
        report.compare(f"{step} loss", losses[1], losses[0])
        compare_gradients(report, gradients(got, report), gradients(want, None), f"{step} ")
    return report, counter.frame_count // len(got.model.layers)
