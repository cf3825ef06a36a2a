"""Greedy and beam decoding of a parallel model against the unsharded one."""

from __future__ import annotations

from typing import Any

import torch
from harness import batches
from harness.batches import Batch
from harness.parity import Case, each, pair
from harness.report import Report


def generation(case: Case) -> dict[str, Report]:
    """Tokens, and the logits of every decoding step, for each kind of prompt.

    Tokens alone would show little: a small model repeats itself whatever its cache holds.
    """
    model, parallel = pair(case)
    model.eval()
    parallel.eval()
    vocab = model.config.vocab_size
    prompts: dict[str, tuple[Batch, dict[str, Any]]] = {
        f"length{length}-batch{batch}": (batches.plain(batch, length, vocab), {})
        for length in (1, 5, 8, 17)
        for batch in (1, 3)
    }
    prompts["left-padded"] = (batches.left_padded_without_positions(3, 9, vocab), {})
    prompts["no-cache"] = (batches.plain(3, 5, vocab), {"use_cache": False})
    prompts["beams"] = (batches.plain(2, 5, vocab), {"num_beams": 3})

    def run(report: Report, name: str) -> None:
        prompt, options = prompts[name]
        ids = prompt["input_ids"]
        mask = prompt.get("attention_mask", torch.ones_like(ids))
        # 12 tokens each: past the sliding window, and eos (which one row may meet) must not end the
        # others' rows.
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **options}
        # generate() casts logits to float32.
        report.dtype = "float32"
        compare_generation(report, model, parallel, ids, attention_mask=mask, **options)

    return each(case, prompts, run)


def compare_generation(
    report: Report, model: Any, parallel: Any, ids: torch.Tensor, **options: Any
) -> None:
    """Tokens and logits of each step."""
    want, got = (
        one.generate(
            input_ids=ids,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
        for one in (model, parallel)
    )
    report.compare("tokens", got.sequences, want.sequences)
    for step, (one, other) in enumerate(zip(got.logits, want.logits, strict=True)):
        report.compare(f"logits of step {step}", one, other)
