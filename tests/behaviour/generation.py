"""Generation by a parallel model against the unsharded one."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import batches
from harness.batches import Batch
from harness.parity import Case, each, pair
from harness.report import Report
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, pipeline

from hf_sp.model import forward

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
# How a prompt is continued, besides greedily with the cache that transformers makes.
STRATEGIES: dict[str, dict[str, Any]] = {
    "no-cache": {"use_cache": False},
    "beams": {"num_beams": 3},
    "static-cache": {"cache_implementation": "static"},
    "chunked-prefill": {"prefill_chunk_size": 3},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beam-sampling": {"do_sample": True, "num_beams": 2},
    "prompt-lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {},
}


def generation(case: Case, names: tuple[str, ...] = ()) -> dict[str, Report]:
    """Tokens, and the logits of every decoding step, for each kind of prompt, or for those named.

    Tokens alone would show little: a small model repeats itself whatever its cache holds. Prompts
    are prefilled on sequence shards, but for those that are called small.
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
    padded = batches.left_padded_without_positions(3, 9, vocab)
    prompts["left-padded"] = prompts["left-padded-small"] = (padded, {})
    prompts["small"] = (batches.plain(3, 17, vocab), {})
    for name, options in STRATEGIES.items():
        # transformers looks ahead for one row alone.
        alone = name in ("prompt-lookup", "assisted")
        prompts[name] = (batches.plain(1 if alone else 2, 8, vocab), options)

    def run(report: Report, name: str) -> None:
        prompt, options = prompts[name]
        ids = prompt["input_ids"]
        mask = prompt.get("attention_mask", torch.ones_like(ids))
        # 12 tokens each: past the sliding window, and eos (which one row may meet) must not end the
        # others' rows.
        options = {**GREEDY, "do_sample": False, **options}
        if name == "assisted":
            options["assistant_model"] = model
        # generate() casts logits to float32.
        report.dtype = "float32"
        shard_from = forward.SHARD_FROM if name.endswith("small") else 0
        with mock.patch.object(forward, "SHARD_FROM", shard_from):
            compare_generation(report, model, parallel, ids, attention_mask=mask, **options)

    return each(case, names or prompts, run)


def text_pipeline(case: Case) -> dict[str, list[str]]:
    """What ``pipeline("text-generation")`` makes of the unsharded and of the parallel model."""
    model, parallel = pair(case.varied(dtype="float32"))
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", eos_token="w2")
    tokenizer.padding_side = "left"
    found = {}
    for name, one in (("unsharded", model), ("parallel", parallel)):
        write = pipeline("text-generation", model=one.eval(), tokenizer=tokenizer)
        answers = write(["w5 w9 w11", "w7"], batch_size=2, max_new_tokens=8, do_sample=False)
        found[name] = [answer[0]["generated_text"] for answer in answers]
    return found


def compare_generation(
    report: Report, model: Any, parallel: Any, ids: torch.Tensor, **options: Any
) -> None:
    """Tokens and logits of each step."""
    options = {"do_sample": False, **options}
    made = []
    for one in (model, parallel):
        # The ranks' generators differ: all draw as the first one does.
        torch.manual_seed(5 if one is model else 5 + dist.get_rank())
        made.append(
            one.generate(input_ids=ids, return_dict_in_generate=True, output_logits=True, **options)
        )
    want, got = made
    report.compare("tokens", got.sequences, want.sequences)
    for step, (one, other) in enumerate(zip(got.logits, want.logits, strict=True)):
        report.compare(f"logits of step {step}", one, other)
