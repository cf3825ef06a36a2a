"""Any batch, any way of calling: answers and gradients as of the unsharded model.

One pytest id for each input; those of a model and tp run in one job on the persistent ranks, at the
first of them. What each input or use is, is in inputs.py and uses.py.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from harness import tiny
from harness.parity import Case, assert_parity
from harness.pool import run_on_ranks, run_once
from transformers import DynamicCache

from behaviour import inputs, uses
from behaviour.generation import STRATEGIES, generation, text_pipeline
from hf_sp import parallelize
from hf_sp.estimate import StepAccounting, fake_world
from hf_sp.model import forward

# (tp, case): a padding row and biases; a vocabulary that no tp divides; a window shorter than the
# sequence, under the eager mask; qk-norm and a tied head; kv heads on several ranks; plain tensor
# parallelism.
INPUT_MODELS = [
    (2, Case("llama_bias")),
    (4, Case("llama_odd_vocab")),
    (2, Case("mistral", attn="eager")),
    (2, Case("qwen3_tied")),
    (4, Case("llama_kv2")),
    (2, Case("llama_odd_vocab", sp=False)),
]
USE_MODELS = [
    (2, Case("llama_bias")),
    (4, Case("llama_odd_vocab")),
    (2, Case("qwen3_tied", attn="eager")),
    (2, Case("llama_tied", sp=False)),
]
PROMPTS = [
    *(f"length{length}-batch{batch}" for length in (1, 5, 8, 17) for batch in (1, 3)),
    "left-padded",
    "left-padded-small",
    "small",
    *STRATEGIES,
]
GENERATION_MODELS = [
    (2, Case("llama_bias")),
    (2, Case("mistral")),
    (4, Case("llama_kv2")),
    (4, Case("qwen3_tied", attn="eager")),
    (2, Case("qwen2", sp=False)),
]
# Families whose caches are of other kinds, each with some prompts and strategies. Static caches and
# looking ahead are not for recurrent states. transformers cannot decode padded rows while it makes
# an auxiliary loss.
_LONG = "length17-batch3"
_NO_LOSS = (("output_router_logits", False),)
_EP = (("ep", 2),)
PAIRS: list[tuple[int, Case, tuple[str, ...]]] = [
    (2, Case("llama_kv1"), (_LONG, "no-cache", "beam-sampling")),
    (4, Case("llama_kv1", sp=False), ("left-padded", "chunked-prefill", "sampling")),
    (4, Case("gemma3"), (_LONG, "left-padded", "beams", "prompt-lookup")),
    (2, Case("gemma2", attn="eager"), ("length8-batch3", "static-cache", "sampling")),
    (
        2,
        Case("mixtral", parallelize=_EP, model_kwargs=_NO_LOSS),
        ("left-padded", "beam-sampling", "no-cache"),
    ),
    (4, Case("mixtral", model_kwargs=_NO_LOSS), (_LONG, "small", "prompt-lookup")),
    (2, Case("qwen3_next", model_kwargs=_NO_LOSS), (_LONG, "left-padded-small", "sampling")),
    (4, Case("qwen3_next", model_kwargs=_NO_LOSS), ("length5-batch1", "beams", "no-cache")),
    (2, Case("bamba"), ("left-padded", "beams", "sampling")),
    (4, Case("bamba"), (_LONG, "no-cache", "beam-sampling")),
    (2, Case("gpt_oss", attn="eager"), (_LONG, "chunked-prefill", "assisted")),
    (4, Case("deepseek_v3"), ("left-padded", "static-cache", "sampling")),
    (2, Case("deepseek_v3"), (_LONG, "beams", "assisted")),
]
FROZEN = ["norm", "q_proj", "down_proj", "layers.1", "embed_tokens", "lm_head"]


def _check(tp: int, probe: Callable, case: Case, name: str) -> None:
    per_rank = run_once(tp, probe, timeout=240, case=case)
    assert_parity([reports[name] for reports in per_rank])


def _ids(models):
    return [
        f"tp{tp}-{case.family}-{case.attn}-{'sp' if case.sp else 'tp-only'}" for tp, case in models
    ]


def _cells(models, names):
    """Each name with each model, grouped by model so that a job's cells are neighbours.

    The first model is quick enough for the inner loop.
    """
    return [
        pytest.param(tp, case, name, id=f"{label}-{name}", marks=marks)
        for (tp, case), label, marks in zip(
            models, _ids(models), [(), *[pytest.mark.slow] * (len(models) - 1)], strict=True
        )
        for name in (names(tp, case) if callable(names) else names)
    ]


@pytest.mark.parametrize(
    ("tp", "case", "name"), _cells(INPUT_MODELS, lambda tp, case: inputs.input_names(tp))
)
def test_input(tp, case, name):
    """Loss and every gradient in training, loss and logits in eval, logits without labels."""
    _check(tp, inputs.inputs, case, name)


@pytest.mark.parametrize(
    ("tp", "case", "name"),
    # HF returns attention weights with eager attention only.
    _cells(
        USE_MODELS,
        lambda tp, case: [n for n in uses.USES if n != "attentions" or case.attn == "eager"],
    ),
)
def test_use(tp, case, name):
    """Gradients through logits, hidden states, several graphs, no_grad, tuples, ..."""
    _check(tp, uses.uses, case, name)


@pytest.mark.parametrize(("tp", "case", "name"), _cells(GENERATION_MODELS, PROMPTS))
def test_generate(tp, case, name):
    _check(tp, generation, case, name)


@pytest.mark.parametrize(
    ("tp", "case", "names", "name"),
    [
        pytest.param(
            *pair,
            name,
            id=f"tp{pair[0]}-{pair[1].family}-{name}",
            marks=[pytest.mark.slow] if pair[0] == 4 else [],
        )
        for pair in PAIRS
        for name in pair[2]
    ],
)
def test_generate_with_other_caches(tp, case, names, name):
    per_rank = run_once(tp, generation, timeout=240, case=case, names=names)
    assert_parity([reports[name] for reports in per_rank])


def test_every_strategy_meets_several_families():
    for strategy in (*STRATEGIES, "left-padded", _LONG):
        met = {case.family for _, case, names in PAIRS if strategy in names}
        assert len(met) >= 1 + (strategy not in ("static-cache", "assisted", "prompt-lookup"))


def test_a_pipeline_writes_the_same_text():
    for found in run_once(2, text_pipeline, case=Case("llama_bias")):
        assert found["parallel"] == found["unsharded"]
        assert all(len(text.split()) > 3 for text in found["parallel"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "deepseek_v3", "bamba", "mixtral"])
def test_collectives_of_decoding(family):
    """By count: nothing along the sequence, two all-reduces a layer; a long prefill is sharded."""
    with fake_world(2) as mesh, torch.no_grad():
        model = parallelize(tiny.build(family, torch.float32), mesh=mesh).eval()
        counts = {}
        for name, length in (("long", 4096), ("short", 33), ("token", 1)):
            cache = DynamicCache(config=model.config)
            sizes = {"long": 0, "short": forward.SHARD_FROM, "token": 0}
            with (
                mock.patch.object(forward, "SHARD_FROM", sizes[name]),
                StepAccounting() as accounting,
            ):
                ids = torch.zeros(1, length, dtype=torch.long)
                out = model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            assert out.logits.grad_fn is None
            found = accounting.collectives("forward")
            counts[name] = {k: c.calls for k, c in found.items()}
            assert name == "long" or found["all_reduce"].bytes == 5 * length * 64 * 4
    # The embedding's sum and the logits' all-gather beside those of two layers.
    assert counts["token"] == counts["short"] == {"all_reduce": 1 + 2 * 2, "all_gather": 1}
    assert counts["long"] == {"all_gather": 2 * 2 + 1 + 1, "reduce_scatter": 1 + 2 * 2}


@pytest.mark.parametrize("pattern", FROZEN)
def test_frozen_parameters(pattern):
    """Parameters frozen before `parallelize` stay frozen; the gradients of the others are right."""
    per_rank = run_once(2, uses.frozen, case=Case("llama"), patterns=tuple(FROZEN))
    assert_parity([reports[pattern] for reports in per_rank])


@pytest.mark.parametrize("tp", [2, 4])
def test_different_batches_on_the_ranks_are_refused(tp):
    """Silent otherwise: each rank's loss would be a mixture of two batches."""
    answers = run_on_ranks(tp, uses.different_batches, case=Case("llama"))
    assert all("Error" in answer for answer in answers), answers
