"""``hf-sp explain``: what it says of a step is what the step does."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from harness import tiny

from hf_sp import supports
from hf_sp.commands.main import main
from hf_sp.commands.rank import DTYPES, Run, build_on_meta, count
from hf_sp.estimate import CollectiveCount
from hf_sp.plan.layouts import Tokens
from hf_sp.plan.step import step_layout

# A length that tp does not divide.
SHORT = Run(tp=2, seq=21, batch=2, optimizer="none")


def _told(family: str, run: Run) -> dict[str, dict[str, CollectiveCount]]:
    """Collectives of a step by phase and kind; the payload of rows that a router sends is 0."""
    config = tiny.config(family)
    plan = supports(config, run.tp, run.sp, ep=run.ep).plan
    model = build_on_meta(config, DTYPES[run.dtype])
    logits = bool(getattr(config, "output_router_logits", False))
    tokens = Tokens(run.batch, run.seq, 2, run.lora, router_logits=logits)
    found: dict[str, dict[str, CollectiveCount]] = {"forward": {}, "backward": {}}
    for one in step_layout(model, plan, tokens).collectives():
        before = found[one.phase].get(one.kind, CollectiveCount())
        found[one.phase][one.kind] = before + CollectiveCount(1, one.bytes)
    return found


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("llama", {}),
        ("llama_tied", {"tp": 4}),
        ("llama_kv1", {}),
        ("llama", {"sp": False}),
        ("llama", {"lora": 3}),
        ("llama_kv1", {"lora": 3, "sp": False}),
        ("qwen3", {"sp": False}),
        ("phi3", {}),
        ("gpt_neox", {}),
        ("olmo2", {}),
        ("cohere", {}),
        ("mixtral", {"sp": False}),
        ("mixtral", {"ep": 2}),
        ("qwen2_moe", {"ep": 2}),
        ("qwen3_moe", {}),
        ("deepseek_v3", {}),
        ("qwen3_next", {}),
        ("bamba", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}={v}" for k, v in x.items()) or "sp",
)
def test_a_step_sends_what_is_told(family, changed):
    run = Run(**{**vars(SHORT), **changed})
    told, found = _told(family, run), count(tiny.config(family), run).collectives
    for phase, kinds in told.items():
        rows = kinds.pop("all_to_all", None)
        sent = dict(found[phase])
        if rows is not None:
            # As many as the router says.
            assert sent.pop("all_to_all").calls == rows.calls
        assert sent == kinds


def test_the_loss_by_chunks():
    """Of 2 x 4,999 tokens: two whole chunks and the rest."""
    run = Run(tp=2, seq=4999, batch=2, optimizer="none")
    told, found = _told("llama", run), count(tiny.config("llama"), run).collectives
    assert told["forward"] == found["forward"]
    assert told["forward"]["reduce_scatter"].calls == 1 + 4 + 3


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "qwen3_next", "bamba"])
def test_blocks_are_told_as_they_run(family):
    config = tiny.config(family)
    model = build_on_meta(config, torch.bfloat16)
    for layer in step_layout(model, supports(config, 2).plan, Tokens(2, 8)).layers:
        assert layer.stages[0].what == "attention"
        assert len(layer.stages) == 3


def test_frozen_parts_send_less():
    """Only the last layer trains: what is before has no backward."""
    model = build_on_meta(tiny.config("llama"), torch.bfloat16).requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    plan = supports(tiny.config("llama"), 2).plan
    layout = step_layout(model, plan, Tokens(2, 8))
    first, last = (
        Counter(c.kind for s in layer.stages for c in s.collectives if c.phase == "backward")
        for layer in layout.layers
    )
    assert first == {}
    assert last == {"all_gather": 4, "reduce_scatter": 2, "all_reduce": 1}


@pytest.fixture
def saved(tmp_path):
    tiny.config("qwen3_moe").save_pretrained(tmp_path)
    return str(tmp_path)


def test_for_programs(capsys, saved):
    main(["explain", saved, "--tp", "2", "--ep", "2", "--seq", "16", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["supported"]
    dense, sparse = answer["layout"]["layers"]
    assert (dense["mlp"], sparse["mlp"]) == ("FULL", "SCATTERED")
    assert dense["residual"] == sparse["input"] == "SCATTERED"
    assert answer["totals"]["forward"]["all_to_all"]["calls"] == 4
    assert answer["plan"]["ep"] == 2
    bytes_each = [c["bytes"] for s in dense["stages"] for c in s["collectives"]]
    assert 16 * 64 * 2 in bytes_each


@pytest.mark.slow
def test_for_people(capsys, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    picture = tmp_path / "layer.png"
    main(["explain", saved, "--tp", "2", "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert "attention FULL, mlp FULL, residual SCATTERED" in " ".join(printed.split())
    assert "reduce_scatter" in printed
    assert picture.stat().st_size > 1000


def test_not_supported(capsys, saved):
    with pytest.raises(SystemExit, match="1"):
        main(["explain", saved, "--tp", "3", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert not answer["supported"]
    assert "legal:  tp = 1, 2, 4, 8" in answer["reason"]
    with pytest.raises(SystemExit, match="1"):
        main(["explain", saved, "--tp", "3"])
    assert "legal:  tp = 1, 2, 4, 8" in capsys.readouterr().out


def test_no_such_layer(capsys, saved):
    with pytest.raises(SystemExit, match="2"):
        main(["explain", saved, "--tp", "2", "--layer", "2"])
    assert "0 to 1" in capsys.readouterr().err
