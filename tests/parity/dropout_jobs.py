"""Dropout of hidden states against the unsharded model, which is given the ranks' masks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist
from harness import batches, tiny
from harness.compare import attempt, compare_gradients, gather_objects, gradients, local
from harness.parity import around as in_place
from harness.report import Report
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from hf_sp import parallelize

P = 0.3
# Where each drops: tokens between blocks; outputs of a row linear; both, and the embedding.
FAMILIES = {
    "phi3": {"resid_pdrop": P},
    "seed_oss": {"residual_dropout": P},
    "gpt_neox": {"hidden_dropout": P},
}


@dataclass(frozen=True)
class Case:
    """One family; `around` names a mutant."""

    family: str
    sp: bool = True
    checkpoint: str = "none"
    around: str | None = None

    def varied(self, *, around: str | None = None, **_: object) -> Case:
        return replace(self, around=around)

    def __str__(self) -> str:
        return f"dropout-{self.family}-{'sp' if self.sp else 'tp-only'}-{self.checkpoint}"


@contextlib.contextmanager
def _dropout(mask: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Instead of torch's: `mask(x)` times x, in training."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * mask(x) if training and p else x

    with mock.patch.object(nn.functional, "dropout", dropout):
        yield


def _whole(masks: list[Tensor], shape: torch.Size, report: Report) -> Tensor:
    """One mask of what the ranks have dropped of one tensor."""
    if masks[0].shape[1] >= shape[1]:
        # In an MLP there are rows that pad the sequence.
        if not all(torch.equal(m, masks[0]) for m in masks):
            report.problems.append("ranks drop other places of what they hold alike")
        return masks[0][:, : shape[1]]
    if any(torch.equal(m, masks[0]) for m in masks[1:]):
        report.problems.append("ranks drop the same places of their own tokens")
    return torch.cat(masks, 1)[:, : shape[1]]


def drops(case: Case) -> Report:
    """Loss and gradients, with ranks seeded apart; a recomputed mask is the forward's."""
    report = Report(str(case), dist.get_rank())
    model = tiny.build(case.family, **FAMILIES[case.family])
    batch = batches.plain(2, 17)
    masks: list[Tensor] = []
    drop = nn.functional.dropout

    def draw(x: Tensor) -> Tensor:
        masks.append(drop(torch.ones_like(x), P, True))
        return masks[-1]

    with in_place(case):
        parallel = parallelize(copy.deepcopy(model), sp=case.sp)
        if case.checkpoint != "none":
            parallel.gradient_checkpointing_enable(
                {"use_reentrant": case.checkpoint == "reentrant"}
            )
        torch.manual_seed(11 + dist.get_rank())
        before = torch.get_rng_state()
        with _dropout(draw):
            loss = parallel(**batch).loss
            count = len(masks)
            after = torch.get_rng_state()
            loss.backward()
    if torch.equal(before, after):
        report.problems.append("the next forward would drop the same places")
    again = masks[count:]
    if (case.checkpoint != "none") != bool(again):
        report.problems.append(f"{len(again)} masks drawn in backward")
    if not all(any(torch.equal(m, first) for first in masks[:count]) for m in again):
        report.problems.append("a recomputed layer drops other places")
    everyone = gather_objects([m.detach() for m in masks[:count]])
    replayed = iter(zip(*everyone, strict=True))
    truth = tiny.reference(model)
    with _dropout(lambda x: _whole(list(next(replayed)), x.shape, report)):
        want = truth(**batch).loss
    want.backward()
    report.compare("loss", loss, want)
    compare_gradients(report, gradients(parallel, report), gradients(truth))
    return report


def drops_all(cases: tuple[Case, ...]) -> list[Report]:
    """`drops` for each case."""
    return [attempt(str(case), lambda case=case: drops(case)) for case in cases]


def classifier() -> tuple[bool, bool]:
    """In front of a classifier: (the same logits on ranks seeded apart, others next time)."""
    config = tiny.config("llama", num_labels=3, classifier_dropout=P)
    torch.manual_seed(0)
    model = parallelize(AutoModelForTokenClassification.from_config(config).train())
    torch.manual_seed(dist.get_rank())
    ids = torch.arange(12).view(1, 12)
    logits = [local(model(input_ids=ids).logits).detach() for _ in range(2)]
    everyone = gather_objects(logits[0])
    return all(torch.equal(x, logits[0]) for x in everyone), not torch.equal(*logits)
