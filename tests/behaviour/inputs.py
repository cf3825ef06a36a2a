"""Every kind of batch, and the rank function that holds a parallel model to it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from harness import batches
from harness.batches import Batch
from harness.compare import attempt, compare_loss, compare_once, compare_plain, evaluating, fresh
from harness.parity import Case, each, pair
from harness.parity import around as in_place
from harness.report import Report
from torch import nn


def input_names(tp: int) -> list[str]:
    """Names of `named_inputs`, for test ids."""
    return list(named_inputs(tp, 96))


def named_inputs(tp: int, vocab: int) -> dict[str, Batch]:
    """Every kind of batch that a user sends."""
    lengths = sorted({1, tp - 1, tp + 1, 7, 16, 17})
    made = {
        f"length{length}-batch{batch}": batches.with_num_items(
            batches.plain(batch, length, vocab), 5
        )
        for length in lengths
        for batch in (1, 2, 3)
    }
    plain, ragged = batches.plain(2, 17, vocab), batches.ignored_runs(3, 7, vocab)
    return made | {
        # No target at all: HF's mean over nothing, a NaN; its gradients are zero.
        "length1-no-target": batches.plain(2, 1, vocab),
        "length1-shift-labels": {
            **batches.plain(2, 1, vocab),
            "shift_labels": batches.tokens(2, 1, vocab, 3),
        },
        "no-labels-counted": {**plain, "labels": torch.full_like(plain["labels"], batches.IGNORE)},
        "left-padded": batches.left_padded(3, 17, vocab),
        "left-padded-without-positions": batches.left_padded_without_positions(3, 16, vocab),
        "right-padded": batches.right_padded(3, 17, vocab),
        "right-padded-num-items": batches.with_num_items(batches.right_padded(2, 7, vocab)),
        "odd-positions": batches.odd_positions(2, 17, vocab),
        "packed": batches.packed((5, 1, 7, 3), vocab),
        "packed-odd": batches.packed((6, 4, 7), vocab),
        "packed-length1-first-and-last": batches.packed((1, 5, 1, 1, 6, 1), vocab),
        "packed-batch2": batches.packed((5, 1, 7, 3), vocab, batch=2),
        "packed-with-cache": {**batches.packed((5, 1, 7, 3), vocab), "use_cache": True},
        "ignored-runs": ragged,
        "only-first-shard": batches.only_labels_of_shard(0, tp, 2, 16, vocab),
        "only-last-shard": batches.only_labels_of_shard(tp - 1, tp, 2, 17, vocab),
        "shard-boundaries": batches.labels_at_shard_boundaries(tp, 2, 16, vocab),
        "shard-boundaries-odd": batches.labels_at_shard_boundaries(tp, 2, 17, vocab),
        "only-last-token": batches.all_ignored_but_last(2, 17, vocab),
        "num-items": batches.with_num_items(ragged),
        "num-items-int": {**ragged, "num_items_in_batch": 11},
        "shift-labels": batches.with_shift_labels(ragged),
        "shift-labels-num-items": batches.with_num_items(batches.with_shift_labels(plain)),
        "inputs-embeds": batches.with_inputs_embeds(plain),
        "inputs-embeds-padded": batches.with_inputs_embeds(batches.left_padded(3, 7, vocab)),
        "mask-4d": batches.mask_4d(2, 17, vocab),
        "mask-of-heads": batches.mask_of_heads(2, 17, vocab),
    }  # fmt: skip


def touched_all(cases: Iterable[Case]) -> list[Report]:
    """A hook reads the embedding's output, as one for noise does: layer 0 is given the whole."""

    def touched(case: Case) -> Report:
        report = Report(str(case), dist.get_rank(), case.dtype)
        with in_place(case):
            model, parallel = pair(case)
            for one in (model, parallel):
                one.get_input_embeddings().register_forward_hook(lambda module, args, out: out + 0)
            compare_once(report, model, parallel, batches.plain(2, 17, model.config.vocab_size))
        return report

    return [attempt(str(case), lambda case=case: touched(case)) for case in cases]


def inputs(case: Case, only: tuple[str, ...] = ()) -> dict[str, Report]:
    """Each batch, or those of some names only.

    Train mode (loss, all gradients), then eval with and without labels (loss, logits).
    """
    model, parallel = pair(case)
    made = named_inputs(dist.get_world_size(), model.config.vocab_size)
    made = {name: made[name] for name in only or made}

    def run(report: Report, name: str) -> None:
        compare_once(report, model, parallel, made[name])
        with evaluating(model, parallel):
            _compare_eval(report, model, parallel, made[name])

    return each(case, made, run)


def _compare_eval(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    got, want = parallel(**fresh(batch)), model(**fresh(batch))
    compare_loss(report, got.loss, want.loss, "eval ")
    compare_plain(report, "eval logits", got.logits, want.logits)
    unlabelled = {
        k: v for k, v in batch.items() if k not in ("labels", "shift_labels", "num_items_in_batch")
    }
    got, want = parallel(**fresh(unlabelled)), model(**fresh(unlabelled))
    if got.loss is not None:
        report.problems.append("a loss without labels")
    compare_plain(report, "logits without labels", got.logits, want.logits)
