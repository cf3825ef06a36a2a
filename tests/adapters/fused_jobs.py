"""Rank functions: TRL's fused head on a mixture of experts, with the auxiliary loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from harness import batches
from harness.compare import attempt, compare_gradients, fresh, gradients
from harness.parity import Case, around, pair
from harness.report import Report

from hf_sp.integrations.trl_patches import add_parallel_head


def fused_all(cases: Iterable[Case]) -> list[Report]:
    """`fused` for each case."""
    return [attempt(str(case), lambda case=case: fused(case)) for case in cases]


def fused(case: Case) -> Report:
    """The loss of the fused head, and its gradients, against the unsharded model's own loss."""
    report = Report(str(case), dist.get_rank(), case.dtype)
    with around(case):
        model, parallel = pair(case)
        add_parallel_head(None, parallel)
        batch = batches.left_padded(2, 17)
        want = model(**fresh(batch))
        got = parallel(**fresh(batch), fused_lm_head=True)
        report.compare("loss", got.loss, want.loss)
        report.compare("auxiliary loss", got.aux_loss, want.aux_loss)
        want.loss.backward()
        got.loss.backward()
        compare_gradients(report, gradients(parallel, report), gradients(model))
    return report
