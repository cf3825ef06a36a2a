"""Remedies of a plan's refusals, followed: what they say is taken then, and nothing less is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from harness import tiny
from harness.pool import pool
from transformers import AutoConfig

import hf_sp
from refusals import jobs

# 28 query and 4 key/value heads, as Qwen2.5-7B has.
SIZES = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 448}


def _parts(reason: str) -> dict[str, str]:
    """A refusal's parts by their names."""
    found = re.findall(r"^  (\w+): +(.*(?:\n {10}.*)*)", reason, re.MULTILINE)
    return {name: re.sub(r"\n {10}", "\n", text) for name, text in found}


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


@pytest.mark.parametrize(
    ("family", "tp", "sizes"),
    [
        ("qwen2", 8, SIZES),
        ("qwen2", 6, SIZES),
        ("llama", 3, {}),
        ("llama", 16, {}),
        ("phi3", 5, {}),
        ("qwen3_moe", 5, {}),
    ],
)
def test_tp(family, tp, sizes):
    config = tiny.config(family, **sizes)
    parts = _parts(hf_sp.supports(config, tp=tp).reason)
    legal = _numbers(parts["legal"])
    assert tp not in legal
    # All of them, and no other.
    assert [n for n in range(1, 33) if hf_sp.supports(config, tp=n)] == legal
    best, *groups = _numbers(parts["remedy"])
    assert best == max(n for n in legal if n <= tp)
    assert groups in ([], [tp // best])
    if groups:
        assert best * groups[0] == tp


def test_tp_with_data_parallel_ranks():
    """As the refusal of tp=4 says: two ranks of tp, two groups."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
    parts = _parts(hf_sp.supports(tiny.config("llama", **sizes), tp=4).reason)
    assert parts["remedy"] == "tp=2, dp_shard=2"
    for message in pool(4).run(jobs.takes, family="llama", sizes=sizes, tp=2, dp_shard=2):
        assert message is None


@pytest.mark.parametrize(("ep", "more"), [(3, {}), (8, {}), (2, {"sp": False})])
def test_ep(ep, more):
    config = tiny.config("mixtral")
    legal = _numbers(_parts(hf_sp.supports(config, tp=2, ep=ep, **more).reason)["legal"])
    assert ep not in legal
    assert legal
    assert all(hf_sp.supports(config, tp=2, ep=n, **more) for n in legal)


def test_dropout():
    config = AutoConfig.for_model("biogpt", num_hidden_layers=1)
    plan = {"biogpt.layers.*.self_attn.q_proj": "colwise"}
    assert not hf_sp.supports(config, tp=2, plan=plan)
    config = tiny.config("llama")
    config.hidden_dropout = 0.1
    parts = _parts(hf_sp.supports(config, tp=2).reason)
    assert parts["where"] == "config.hidden_dropout"
    assert parts["remedy"] == "set it to 0 in the config"
    config.hidden_dropout = 0.0
    assert hf_sp.supports(config, tp=2)


def test_a_plan_for_a_model_without_one():
    """`plan=` as docs/plans.md has it, of a class that transformers has no layer plan for."""
    config = tiny.config("llama")
    parts = _parts(hf_sp.supports(config, tp=2, plan={"lm_head": "colwise_gather_output"}).reason)
    assert "plan={'model.layers.*.self_attn.q_proj': 'colwise', ...}" in parts["remedy"]
    column, row = ("q", "k", "v"), ("self_attn.o_proj", "mlp.down_proj")
    layer: dict[str, Any] = {f"self_attn.{n}_proj": "colwise" for n in column}
    layer |= {f"mlp.{n}_proj": "colwise" for n in ("gate", "up")} | dict.fromkeys(row, "rowwise")
    assert hf_sp.supports(config, tp=2, plan={f"model.layers.*.{k}": v for k, v in layer.items()})
    # A weight that no key claims is named, and a style for it is taken.
    one = layer.pop("mlp.up_proj")
    short = {f"model.layers.*.{k}": v for k, v in layer.items()}
    parts = _parts(hf_sp.supports(config, tp=2, plan=short).reason)
    assert parts["where"].endswith("mlp.up_proj.weight")
    assert "with a style for it" in parts["remedy"]
    assert hf_sp.supports(config, tp=2, plan={**short, "model.layers.*.mlp.up_proj": one})
