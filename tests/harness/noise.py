"""Errors of low precision: the parallel model's beside the unsharded one's."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist

from harness import batches, tiny
from harness.compare import fresh, gradients
from harness.parity import Case, pair
from harness.report import Report


def noise(case: Case, autocast: bool = False, policy: bool = False) -> dict[str, float]:
    """Errors of the parallel and of the unsharded model in bfloat16, both against float64.

    The float64 model has the same (rounded) weights. Returns root-sum-square errors over all
    gradients of several batches, relative to the gradients' size, and the largest ratio of the two
    models' errors in one parameter. With a policy the parallel model's own weights are float32.
    """
    model, parallel = pair(case)
    if policy:
        model = tiny.build(case.family, torch.bfloat16, case.seed, case.attn)
        parallel.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    truth = tiny.reference(tiny.build(case.family, torch.float64, case.seed, case.attn))
    truth.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    squares: dict[str, list[float]] = {}
    losses = [0.0, 0.0]
    report = Report(str(case), dist.get_rank(), case.dtype)
    for seed in range(4):
        batch = batches.left_padded(2, 17, model.config.vocab_size, seed)
        results = []
        for one in (truth, model, parallel):
            one.zero_grad(set_to_none=True)
            context = (
                torch.autocast("cpu", torch.bfloat16)
                if autocast and one is not truth
                else contextlib.nullcontext()
            )
            with context:
                loss = one(**fresh(batch)).loss
            loss.backward()
            results.append((loss.item(), gradients(one, report if one is parallel else None)))
        (want, exact), (loss_u, unsharded), (loss_p, sharded) = results
        losses[0] += (loss_u - want) ** 2
        losses[1] += (loss_p - want) ** 2
        for name, gradient in exact.items():
            sums = squares.setdefault(name, [0.0, 0.0, 0.0])
            for index, other in enumerate(
                (torch.zeros_like(gradient), unsharded[name], sharded[name])
            ):
                sums[index] += float((other.double() - gradient).square().sum())
    if report.problems:
        raise AssertionError("\n".join(report.problems))
    # Each parameter counts alike, whatever its gradient's size.
    relative = [(u / size, p / size) for size, u, p in squares.values()]
    return {
        "unsharded": (sum(u for u, _ in relative) / len(relative)) ** 0.5,
        "parallel": (sum(p for _, p in relative) / len(relative)) ** 0.5,
        "worst ratio": max((p / u) ** 0.5 for u, p in relative),
        "loss unsharded": (losses[0] / 4) ** 0.5,
        "loss parallel": (losses[1] / 4) ** 0.5,
    }
