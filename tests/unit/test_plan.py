"""Plans are derived from HF's own strings; a change upstream shows as a diff of a golden text.

To write the goldens anew after an intended change: HF_SP_WRITE_GOLDENS=1, then read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from harness import tiny
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

import hf_sp
from hf_sp.errors import PlanError
from hf_sp.plan import derive_plan
from scripts._families import models

GOLDENS = Path(__file__).parent / "goldens"


def _meta(family, auto=AutoModelForCausalLM, **overrides):
    with torch.device("meta"):
        return auto.from_config(tiny.config(family, **overrides))


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_golden(family):
    text = "\n\n".join(
        str(derive_plan(_meta(family), tp, sp)) for tp, sp in [(2, True), (4, False)]
    )
    path = GOLDENS / f"{family}.txt"
    if os.environ.get("HF_SP_WRITE_GOLDENS"):
        path.write_text(text + "\n")
    assert text + "\n" == path.read_text()


def test_every_parameter_of_every_layer_is_placed():
    model = _meta("qwen3")
    plan = derive_plan(model, 2, True)
    named = {leaf.path for block in plan.blocks for leaf in block.leaves}
    named |= {p for block in plan.blocks for p in block.partial} | set(plan.shard_norms)
    named |= {plan.embedding, plan.head}
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    assert owners == named


def test_decoder_alone_and_classifier():
    decoder = derive_plan(_meta("llama", AutoModel), 2, True)
    assert (decoder.decoder, decoder.head, decoder.norm) == ("", None, "norm")
    classifier = derive_plan(_meta("llama", AutoModelForSequenceClassification), 2, True)
    assert (classifier.head, classifier.replicated) == (None, ("score",))


@pytest.mark.parametrize(
    ("overrides", "tp", "legal"),
    [
        ({}, 3, "tp = 1, 2, 4, 8"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, 8, "tp = 1, 2, 4"),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
            2,
            "tp = 1, 3, 6",
        ),
        ({"intermediate_size": 90}, 4, "tp = 1, 2"),
        (
            {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 56},
            8,
            "tp = 1, 2, 4",
        ),
    ],
)
def test_sizes_that_tp_does_not_divide(overrides, tp, legal):
    with pytest.raises(PlanError) as error:
        derive_plan(_meta("llama", **overrides), tp, True)
    assert f"legal:  {legal}" in str(error.value).splitlines()[-2]
    for t in range(1, 33):
        if t in map(int, legal.removeprefix("tp = ").split(", ")):
            derive_plan(_meta("llama", **overrides), t, True)
        else:
            with pytest.raises(PlanError):
                derive_plan(_meta("llama", **overrides), t, True)


def _styles(**changes):
    styles = dict(_meta("llama").tp_plan)
    for key, style in changes.items():
        key = key.replace("__", ".")
        styles = {k: s for k, s in styles.items() if not k.endswith(key)}
        if style:
            styles[f"model.layers.*.{key}"] = style
    return styles


@pytest.mark.parametrize(
    ("styles", "message"),
    [
        ({}, "plan is a dict of strings"),
        ({"model.layers.*.mlp.up_proj": None}, "plan is a dict of strings"),
        ("colwise", "plan is a dict of strings"),
        (_styles(mlp__up_proj="magic"), "styles that hf_sp does not carry out"),
        (_styles(mlp__up_proj="embedding_rowwise"), "styles that hf_sp does not carry out"),
        (_styles(mlp__up_proj="mla_kv_a_proj"), "read by no column linear"),
        (_styles(self_attn__k_proj="mla_kv_a_proj"), "read by no column linear"),
        (_styles(mlp__up_proj="packed_colwise"), "does not make what its row"),
        (_styles(input_layernorm="colwise"), "does not pair"),
        (_styles(mlp__up_proj=None), "claimed by no key"),
        (_styles(mlp__down_proj=None), "does not pair"),
        (_styles(mlp__third_proj="colwise"), "match no module"),
        ({"model.layers.*.self_attn.q_proj": "colwise"}, "does not pair"),
        (
            {"lm_head": "colwise_gather_output"},
            "the plan has no layers of Llama",
        ),
        ({**_styles(), "model.nothing": "colwise"}, "matches no module"),
    ],
)
def test_plans_that_are_refused(styles, message):
    with pytest.raises(PlanError, match=message):
        derive_plan(_meta("llama"), 2, True, styles)


def test_what_a_model_lacks_and_a_vision_tower_has_is_left_out():
    """Gemma 4 without experts, which transformers' plan names; its tower has layers too."""
    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text"))
        both = AutoModelForImageTextToText.from_config(AutoConfig.for_model("gemma4"))
    assert any("experts" in key for key in text.tp_plan)
    assert derive_plan(text, 2, True).decoder == "model"
    assert derive_plan(both, 2, True).decoder == "model.language_model"


@pytest.mark.parametrize(("value", "whole"), [(24, True), (8, False)])
def test_values_of_another_size(value, whole):
    """Heads are told by either size; where a linear could be whole heads of both, by neither."""
    sizes = models.ODD["mimo_v2_flash"] | {"v_head_dim": value}
    with mock.patch.dict(models.ODD, mimo_v2_flash=sizes):
        found = hf_sp.supports(models.config("mimo_v2_flash"), tp=2)
    assert bool(found) is whole
    assert whole or "not made of whole heads" in found.reason


def test_model_without_a_plan():
    with pytest.raises(PlanError, match="has no tensor parallel plan"), torch.device("meta"):
        derive_plan(AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2")), 2, True)


@pytest.mark.parametrize(
    ("family", "attends"),
    [
        ("gpt_neox", ["gpt_neox.layers.0.attention"]),
        ("deepseek_v3", ["model.layers.0.self_attn"]),
        ("gemma3", ["model.layers.0.self_attn"]),
    ],
)
def test_attention_is_known_by_what_it_is_given(family, attends):
    plan = derive_plan(_meta(family), 2, True)
    assert [b.path for b in plan.blocks if b.attention and ".0." in b.path] == attends


def test_a_block_that_is_given_something_else():
    model = _meta("llama")
    model.model.layers[0].mlp.forward = lambda x, states: x
    with pytest.raises(PlanError, match="neither an MLP nor an attention"):
        derive_plan(model, 2, True)


def test_packed_rows_of_a_rank():
    """8 query heads and 4 of keys and values, of 8 features, on 2 and on 8 ranks."""
    leaves = {}
    for tp in (2, 8):
        plan = derive_plan(_meta("phi3"), tp, True)
        leaves[tp] = next(leaf for leaf in plan.blocks[0].leaves if leaf.segments)
        assert leaves[tp].segments == (8, 4, 4)
    assert leaves[2].style == "packed"
    assert leaves[2].rows(2, 1) is None
    assert leaves[8].style == "column_replicated"
    assert leaves[8].rows(8, 5) == ((40, 8), (80, 8), (112, 8))


def test_rows_of_a_mixer():
    """4 key heads of 16 features and 8 value heads of 8, on the second of 2 ranks."""
    plan = derive_plan(_meta("qwen3_5"), 2, True)
    mixer = next(block.mixer for block in plan.blocks if block.mixer)
    rows = {one.name: one.rows(2, 1) for one in mixer.own}
    assert rows["weight"] == ((32, 32), (96, 32), (160, 32))
    assert rows["A_log"] == rows["dt_bias"] == ((4, 4),)


def test_a_mixer_that_tp_does_not_divide():
    with pytest.raises(PlanError, match="heads of linear attention=4, 4 % 8 = 4"):
        derive_plan(_meta("qwen3_5"), 8, True)


class _OtherLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("model.layers.1.mlp.up_proj", "not a plain torch.nn.Linear"),
        ("lm_head", "LM head cannot"),
    ],
)
def test_linears_of_another_class(path, message):
    model = _meta("llama")
    model.get_submodule(path).__class__ = _OtherLinear
    with pytest.raises(PlanError, match=message):
        derive_plan(model, 2, True)


def test_weight_outside_the_blocks():
    model = _meta("llama")
    model.model.layers[0].extra = nn.Linear(4, 4, device="meta")
    with pytest.raises(PlanError, match=r"layers\.0\.extra\.weight"):
        derive_plan(model, 2, True)


def test_dropout_in_the_layers():
    model = _meta("llama")
    model.model.layers[1].dropout = nn.Dropout(0.1)
    with pytest.raises(PlanError, match=r"layers\.1\.dropout"):
        derive_plan(model, 2, True)


def test_dropout_in_a_forward():
    with torch.device("meta"):
        config = AutoConfig.for_model("seed_oss", num_hidden_layers=1, residual_dropout=0.1)
        model = AutoModelForCausalLM.from_config(config)
    assert derive_plan(model, 2, True).dropout
    model.config.model_type = "another"
    with pytest.raises(PlanError, match=r"config\.residual_dropout"):
        derive_plan(model, 2, True)


def test_embedding_that_renormalises():
    model = _meta("llama")
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(PlanError, match="embedding cannot be made vocab-parallel"):
        derive_plan(model, 2, True)
