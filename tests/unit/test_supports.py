"""`supports` says what `parallelize` would say, without weights, ranks or a launch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_sp
from hf_sp.errors import PlanError
from hf_sp.plan import derive_plan


def test_yes_with_the_plan():
    config = tiny.config("qwen3")
    found = hf_sp.supports(config, tp=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert found
    assert (found.plan, found.reason) == (derive_plan(model, 4, True), "")
    assert str(found) == str(found.plan)
    assert not dist.is_initialized()


def test_no_with_the_reason():
    config = AutoConfig.for_model("gpt2", n_layer=1)
    found = hf_sp.supports(config)
    with pytest.raises(PlanError) as error, torch.device("meta"):
        derive_plan(AutoModelForCausalLM.from_config(config), 8, True)
    assert not found
    assert found.plan is None
    assert found.reason == str(found) == f"PlanError: {error.value}"


def test_of_a_name(tmp_path):
    tiny.config("llama").save_pretrained(tmp_path)
    assert hf_sp.supports(str(tmp_path), tp=8)
    assert "legal:  tp = 1, 2, 4, 8" in hf_sp.supports(str(tmp_path), tp=16).reason


def test_of_other_arguments():
    sparse = tiny.config("qwen3_moe")
    assert hf_sp.supports(sparse, tp=4, ep=4).plan.ep == 4
    assert "sp=False" in hf_sp.supports(sparse, tp=4, ep=4, sp=False).reason
    assert "positive integer" in hf_sp.supports(sparse, tp=0).reason
    assert "lm_head: magic" in hf_sp.supports(sparse, plan={"lm_head": "magic"}).reason
    classifier = hf_sp.supports(
        tiny.config("llama"), tp=2, model_class=AutoModelForSequenceClassification
    )
    assert classifier.plan.replicated == ("score",)
