"""``hf-sp estimate``: what it says is what real ranks have, and what fits, fits."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from commands import jobs
from harness import tiny
from harness.pool import pool
from transformers import AutoConfig

from hf_sp.commands import layers, rank
from hf_sp.commands.layers import count_whole, layer_collectives, longest
from hf_sp.commands.main import main
from hf_sp.commands.rank import Run, count

SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2, "vocab_size": 250}
LLAMA = {"model_type": "llama", "intermediate_size": 128, "num_key_value_heads": 4, **SIZES}
QWEN = {**LLAMA, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}
SPARSE = {**QWEN, "model_type": "qwen3_moe", "moe_intermediate_size": 32}
SPARSE |= {"num_experts": 8, "num_experts_per_tok": 2}
SHORT = Run(tp=2, seq=256)


@pytest.fixture
def llama(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return str(tmp_path / "config.json")


def answer(capsys, *arguments):
    main(["estimate", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize(
    ("config", "run"),
    [
        (LLAMA, SHORT),
        (QWEN, replace(SHORT, seq=511, batch=2, dtype="float32", optimizer="sgd")),
        (LLAMA, replace(SHORT, checkpointing=True, sp=False)),
        (SPARSE, SHORT),
        (LLAMA, replace(SHORT, tp=1, dp_shard=2, optimizer="adamw_foreach")),
        (LLAMA, replace(SHORT, tp=1, cp=2)),
        (LLAMA, replace(SHORT, tp=1, cp=2, cp_mode="ring")),
        (SPARSE, replace(SHORT, dtype="float32")),
        (SPARSE, replace(SHORT, ep=2, dtype="float32", checkpointing=True)),
        (QWEN, replace(SHORT, lora=4)),
    ],
    ids=[
        *("plain", "odd", "checkpointing", "sparse", "groups", "parts", "ring"),
        *("sparse-f32", "ep", "lora"),
    ],
)
def test_real_ranks_have_what_is_estimated(config, run):
    """All kinds together to 2 %, and each of those that a run is made for to the byte.

    But for what the last collective was given, hidden states at most, and a few scalars: threads of
    gloo may hold it for a while.
    """
    real = pool(2).run(jobs.counted, config=config, run=run)[0]
    estimate = count(AutoConfig.for_model(**config), run)
    held = run.batch * run.seq * config["hidden_size"] * rank.DTYPES[run.dtype].itemsize
    assert 0.98 * real.peak - held <= estimate.peak <= 1.02 * real.peak
    assert estimate.when == real.when
    for kind in ("weights", "optimizer", "activations", "gradients"):
        assert getattr(estimate.kinds, kind) == pytest.approx(getattr(real.kinds, kind), abs=64)
    assert estimate.kept == real.kept
    # Real ranks also compare what they are given in their first forwards.
    gathered = [c.collectives["forward"].pop("all_gather").bytes for c in (estimate, real)]
    assert gathered[0] == pytest.approx(gathered[1], abs=1000)
    for phase in ("forward", "backward") if run.ep > 1 else ():
        # As many rows as a router says; the estimate's is even.
        sent = [c.collectives[phase].pop("all_to_all").calls for c in (estimate, real)]
        assert sent[0] == sent[1] > 2
    assert estimate.collectives == real.collectives


def test_the_kinds_are_the_peak():
    found = count(AutoConfig.for_model(**LLAMA), SHORT)
    assert sum(asdict(found.kinds).values()) == found.peak == max(found.peaks.values())


def test_weights_and_state_are_known(capsys, llama):
    """Of bfloat16 and AdamW, by hand: norms are whole, all else is halved."""
    row = answer(capsys, llama, "--tp", "2", "--seq", "64")[0]
    attention, mlp, norms = 64 * (64 + 32 + 32 + 64), 3 * 64 * 128, 2 * 64
    weights = 2 * ((attention + mlp) // 2 + norms) + 2 * 250 * 64 // 2 + 64
    rotary = 2 * 4 * 4  # its frequencies, twice
    steps = 4 * (2 * 9 + 3)  # a count of each parameter's steps
    assert row["kinds"]["optimizer"] == 2 * 2 * weights + steps
    assert row["kinds"]["weights"] == 2 * weights + rotary


def test_it_stands_beside_others(capsys, llama):
    mine, native, alone = answer(capsys, llama, "--tp", "2", "--seq", "64")
    assert [r["library"] for r in (mine, native, alone)] == list(rank.LIBRARIES)
    assert mine["peak"] < native["peak"] < alone["peak"]
    calls = {k: c["calls"] for k, c in mine["layer"]["forward"].items()}
    assert calls == {"all_gather": 2, "reduce_scatter": 2}
    assert alone["layer"] == {"forward": {}, "backward": {}, "optimizer": {}}


def test_the_longest_fits_and_a_longer_one_does_not():
    config = AutoConfig.for_model(**LLAMA)
    capacity = count(config, replace(SHORT, seq=9000)).peak
    found = longest(config, SHORT, capacity)
    assert count(config, replace(SHORT, seq=found)).peak <= capacity
    assert count(config, replace(SHORT, seq=found + 2048)).peak > capacity
    assert longest(config, SHORT, 1000) == 0


DEEP = {"num_hidden_layers": 13}


@pytest.mark.parametrize(
    ("config", "run"),
    [
        (LLAMA, SHORT),
        # More gradients than activations.
        (LLAMA, replace(SHORT, seq=8, checkpointing=True, dtype="float32")),
        (SPARSE, replace(SHORT, ep=2)),
        (LLAMA, replace(SHORT, library="transformers tp", sp=False)),
    ],
    ids=["activations", "gradients", "sparse", "transformers"],
)
def test_few_layers_tell_of_all(config, run, monkeypatch):
    """To the byte; and so few were counted."""
    deep = AutoConfig.for_model(**{**config, **DEEP})
    want, counted = count(deep, run), []
    monkeypatch.setattr(
        layers, "count", lambda c, r: counted.append(c.num_hidden_layers) or count(c, r)
    )
    assert count_whole(deep, run) == want
    assert counted == list(layers.FEW)


def test_layers_that_differ_are_all_counted(monkeypatch):
    mixed = AutoConfig.for_model(**{**SPARSE, **DEEP, "mlp_only_layers": [9]})
    counted = []
    monkeypatch.setattr(layers, "count", lambda c, r: counted.append(c.num_hidden_layers))
    count_whole(mixed, SHORT)
    assert counted == [13]


@pytest.mark.parametrize("limit", [0, 5, 6, 40, 41, 399, 10**9])
@pytest.mark.parametrize("start", [1, 7, 64])
def test_where_a_convex_line_meets_a_limit(limit, start):
    asked = []

    def value(n):
        asked.append(n)
        return max(3 + n, 4 * n - 30)

    found = layers._last_below(value, limit, start, 64)
    fits = [n for n in range(1, 65) if max(3 + n, 4 * n - 30) <= limit]
    assert found == (fits[-1] if fits else 0)
    assert len(asked) <= 8
    assert len(set(asked)) == len(asked)


def test_no_longer_than_anybody_asks(monkeypatch):
    monkeypatch.setattr(layers, "LONGEST", 8192)
    assert longest(AutoConfig.for_model(**LLAMA), SHORT, 10**12) == 8192


def test_search_puts_what_fits_first(capsys, llama):
    rows = answer(capsys, llama, "--search", "4", "--seq", "1024", "--gpu", "0.004")
    fits = [row["peak"] <= 0.004e9 * 0.92 for row in rows]
    assert fits == sorted(fits, reverse=True)
    assert len(set(fits)) == 2
    assert {(r["tp"], r["dp_shard"]) for r in rows} == {(1, 4), (2, 2), (4, 1)}
    assert "tp must divide" in answer(capsys, llama, "--search", "3")[-1]["error"]


def test_adapters(capsys, llama):
    """They have gradients and state; the base has none."""
    row = answer(capsys, llama, "--tp", "2", "--lora", "4", "--seq", "64")[0]
    assert row["kinds"]["optimizer"] < row["kinds"]["weights"]


def test_for_people(capsys, llama, tmp_path, monkeypatch):
    """The same runs as of test_it_stands_beside_others and of the picture: counted once."""
    monkeypatch.setattr("hf_sp.commands.estimate.longest", lambda *run: 4096)
    monkeypatch.setenv("COLUMNS", "200")
    main(["estimate", llama, "--tp", "2", "--seq", "64", "--gpu", "0.004"])
    printed = capsys.readouterr().out
    assert "hf_sp, a layer: forward 2 reduce_scatter" in printed
    assert "4,096" in printed
    picture = tmp_path / "x.png"
    points = answer(capsys, llama, "--seq", "16", "--gpu", "0.01", "--plot", str(picture))
    assert [(p["tp"], p["seq"]) for p in points[:5]] == [
        (1, 16),
        (1, 32),
        (1, 64),
        (1, 128),
        (2, 16),
    ]
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "3"], "legal:  tp = 1, 2, 4, 8"),
        (["--gpu", "abacus"], "legal:  4090, "),
        (["--ep", "3"], "legal:"),
        (["--seq", "0", "--batch", "-1"], "legal:  1 or more, 1 or more"),
        (["--search", "0"], "legal:  1 or more"),
        (["--gpu", "nan"], "legal:  4090, "),
        (["--plot", "x.doc"], "legal:  a file in a folder that exists"),
        (["--plot", "x.png", "--search", "2"], "legal:  one of them"),
    ],
)
def test_refusals(capsys, llama, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(["estimate", llama, *arguments])
    assert message in capsys.readouterr().err


def test_a_name_that_is_not_there(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["estimate", "nobody/nothing"])
    assert "hf download" in capsys.readouterr().err


@pytest.mark.slow
def test_the_documented_numbers():
    text = (Path(__file__).parents[2] / "docs" / "estimate.md").read_text()
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    shape |= {"num_key_value_heads": 8, "num_hidden_layers": 32, "vocab_size": 128256}
    found = count_whole(AutoConfig.for_model("llama", **shape), Run(tp=8, seq=32768))
    kinds = asdict(found.kinds)
    gradients = kinds.pop("gradients")
    row = [*(f"{kind / 2**30:.2f}" for kind in kinds.values()), f"{found.peak / 2**30:.2f}"]
    assert f"| hf_sp, tp=8 | {' | '.join(row)} | {found.when} |" in text
    assert f"there are {gradients / 2**30:.2f} GiB of them" in " ".join(text.split())


def test_a_layer_behind_one_of_each_kind():
    """A plan of linear attentions alone has keys of an attention that match nothing."""
    sizes = {"num_hidden_layers": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4}
    config = tiny.config("qwen3_5", **sizes, layer_types=None)
    counts = layer_collectives(config, replace(SHORT, tp=2))
    calls = {phase: {k: c.calls for k, c in kinds.items()} for phase, kinds in counts.items()}
    assert calls["forward"] == {"all_gather": 2, "reduce_scatter": 2}
    assert calls["backward"] == {"all_gather": 4, "reduce_scatter": 2, "all_reduce": 1}
