"""``hf_sp.verify`` agrees with what is right, and names the parameter of each planted fault."""

from __future__ import annotations

import json
import re

import pytest
import torch
from harness import tiny
from harness.pool import pool, run_once

from hf_sp.commands.main import main
from proof import jobs


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama_odd_vocab", {"sp": False, "batch": "odd_positions"}),
        ("qwen3", {"kernels": False, "dtype": torch.float32}),
        ("olmo2", {}),
        ("qwen2_moe", {"ep": 2}),
        ("llama", {"lora": True}),
        ("gemma3", {}),
        ("cohere", {"batch": "plain"}),
        # A mixer, its convolution and numbers by head.
        ("qwen3_next", {"batch": "plain"}),
        # Groups of heads on several ranks.
        ("falcon_h1", {}),
        ("granite_hybrid", {"batch": "plain"}),
        # Arguments by token, which the plan's layouts do not tell, as they do not what cp ranks
        # exchange.
        ("gemma4", {}),
        ("mistral", {"tp": 1, "cp": 2, "cp_mode": "ring"}),
        ("qwen3_next", {"tp": 1, "cp": 2}),
        ("llama_tied", {"sp": False, "layers": True}),
        ("qwen3", {"kernels": False, "dtype": torch.float32, "layers": True}),
        ("qwen2_moe", {"ep": 2, "layers": True}),
        ("deepseek_v3", {"layers": True}),
        # Its layers return tuples, and differ.
        ("bamba", {"batch": "plain", "layers": True}),
        # One layer fits, the whole does not.
        ("llama", {"free": 2_200_000}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_right_agrees(family, options):
    for found in pool(2).run(jobs.verified, family=family, **options):
        assert found, str(found)
        assert len(found.rows) > 12
        by_layer = "free" in options or options.get("layers", False)
        assert bool(found.unseen) == by_layer
        whats = [row.what for row in found.rows]
        assert len({*whats}) == len(whats)
        for what in ("output of", "gradient of the input of"):
            assert any(what in one for one in whats) == by_layer


# Faults, and the parameters whose gradients each makes wrong: no others, where it is of one kind.
NORMS = r"(layernorm|norm)\.weight"
FAULTS = {
    "sum_of_a_layer_dropped": ("only", NORMS),
    "gradients_of_two_norms_swapped": ("only", NORMS),
    "partial_gradient_averaged_llama_kv1_tp": ("only", r"[kv]_proj\.weight"),
    "row_bias_gradient_summed_again": ("only", r"o_proj\.bias"),
    "norm_made_again_from_the_wrong_shard": ("only", r"(q|k|v|gate|up)_proj\.weight"),
    "product_made_again_from_gate_alone": ("only", r"down_proj\.weight"),
    "key_s_gradient_goes_to_the_value_s_port": ("among", r"[kv]_proj\.weight"),
    "gated_gradient_without_its_slope": ("among", r"gate_proj\.weight"),
    "block_entry_backward_averages": ("among", "embed_tokens"),
    "loss_gradient_is_not_reduced": ("among", r"down_proj|model\.norm"),
    "embedding_is_not_summed": ("among", "embed_tokens"),
    "router_gradient_is_not_summed": ("only", r"mlp\.gate\.weight"),
    "shared_gate_gradient_is_not_summed": ("only", r"shared_expert_gate\.weight"),
    "expert_gradient_is_scaled": ("only", r"experts\.\w+"),
}


@pytest.mark.parametrize("layers", [False, True], ids=["whole", "by-layer"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_its_parameter_named(name, layers):
    kind, pattern = FAULTS[name]
    first, second = run_once(2, jobs.with_faults, timeout=240, names=tuple(FAULTS), layers=layers)
    found = first[name]
    assert not found
    assert found.as_data() == second[name].as_data()
    wrong = [row.what for row in found.wrong if row.what.startswith("gradient of")]
    named = [
        what for what in wrong if re.search(pattern + "$" if kind == "only" else pattern, what)
    ]
    assert named, str(found)
    assert all(what in str(found) for what in wrong[:1])
    if kind == "only":
        assert named == wrong


@pytest.mark.parametrize("layers", [False, True], ids=["whole", "by-layer"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unsynced_norm", "copies on the ranks differ: model.layers.1.input_layernorm.weight"),
        ("unsynced_buffer", "copies on the ranks differ: model.rotary_emb.inv_freq"),
        ("one_more_gather", "forward: "),
        ("one_more_sum_in_backward", "backward: 1 all_reduce of 8 bytes ran, the plan tells 0"),
    ],
)
def test_what_no_gradient_shows(name, words, layers):
    found = run_once(2, jobs.with_faults, names=tuple(jobs.PLANTED), layers=layers)[0][name]
    assert not found
    assert any(words in problem for problem in found.problems), str(found)
    if name.startswith("one_more"):
        assert found.wrong == []
        assert "the plan tells" in found.problems[0]


def test_replicas_of_a_running_job():
    for fine, bias, shard in pool(2).run(jobs.replicas):
        assert (fine, shard) == ("", "")
        assert "model.layers.0.self_attn.o_proj.bias" in bias


def test_refusals():
    assert "legal:  dtype = " in pool(2).run(jobs.verified, family="llama", dtype=torch.bfloat16)[0]
    assert "dp_shard" in pool(2).run(jobs.verified, family="llama", dp_shard=2)[0]


def test_no_room():
    """Of one layer with the ends there is none either; of adapters layers are not compared."""
    said = pool(2).run(jobs.verified, family="llama", free=1000)[0]
    assert "a layer, or the first with the ends, does not fit" in said
    assert (
        "hf-sp verify --by-layer"
        in pool(2).run(jobs.verified, family="llama", free=1000, layers=False)[0]
    )
    assert (
        "legal:  layers=False"
        in pool(2).run(jobs.verified, family="llama", lora=True, layers=True)[0]
    )


@pytest.mark.parametrize("family", ["llama_tied", "qwen3_moe"])
def test_a_folder_is_read_layer_by_layer(family, tmp_path):
    """Whole and by layer the same numbers, of the same weights; a config has random ones."""
    tiny.build(family, torch.float32, router_aux_loss_coef=0.0).save_pretrained(tmp_path)
    whole, layers = (
        pool(2).run(jobs.read, folder=str(tmp_path), layers=layers)[0] for layers in (False, True)
    )
    for one, other in zip(whole, layers, strict=True):
        assert one, str(one)
        assert other, str(other)
        assert {row.what for row in one.rows} < {row.what for row in other.rows}
    scales = [{row.what: row.scale for row in one.rows} for one in (whole[0], layers[0])]
    for name in ("loss", "gradient of model.layers.0.self_attn.q_proj.weight"):
        assert scales[0][name] == pytest.approx(scales[1][name], rel=1e-9)


def test_memory_of_a_comparison_by_layer():
    """No more for more layers, but for what goes from each to the next: [2, 8, 64] in float64."""
    few, many = (pool(2).run(jobs.alive, layers=n, by_layer=True) for n in (2, 6))
    whole = pool(2).run(jobs.alive, layers=6, by_layer=False)
    layer = 8 * (64 * 64 * 3 + 3 * 64 * 96)
    for rank in (0, 1):
        assert many[rank] - few[rank] <= (4 * 2 * 8 * 64 * 8 if rank == 0 else 0)
        assert whole[rank] - many[rank] > 3 * layer


@pytest.mark.slow
def test_the_command(capsys, tmp_path):
    """Starts its own ranks; a folder with weights, and a config alone with fewer layers."""
    tiny.build("llama", torch.float32).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="0"):
        main(["verify", str(tmp_path), "--tp", "2", "--seq", "9", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["agrees"]
    assert answer["rows"][0]["error"] < answer["tolerance"] == 1e-10
    with pytest.raises(SystemExit, match="0"):
        main(["verify", str(tmp_path / "config.json"), "--tp", "2", "--layers", "1"])
    assert "agrees" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--tp", "3"], "legal:  tp = 1, 2, 4, 8"), (["--layers", "9"], "--layers 1 to 2")],
)
def test_refusals_of_the_command(capsys, tmp_path, arguments, message):
    tiny.config("llama").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["verify", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
