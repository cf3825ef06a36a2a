"""``from_pretrained``: what ``parallelize`` makes, bit for bit; a rank reads its part."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from harness import tiny
from harness.parity import Case, assert_parity, train_all
from harness.pool import pool, run_once
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import hf_sp
from loading import jobs

TWO = {
    "llama": ("llama", {}, {"attn_implementation": "eager"}),
    "tied, in bfloat16": ("llama_tied", {}, {"dtype": torch.bfloat16}),
    "uneven vocabulary": ("llama_odd_vocab", {"sp": False}, {}),
    "qwen3": ("qwen3", {}, {}),
    "experts by features": ("mixtral", {}, {"dtype": "bfloat16"}),
    "whole experts": ("qwen3_moe", {"ep": 2}, {}),
    "groups": ("llama_tied", {"tp": 1, "dp_shard": 2}, {}),
    "classifier": ("llama", {}, {"model_class": AutoModelForSequenceClassification}),
}
FOUR = {
    "kv1": ("llama_kv1", {}, {}),
    "groups": ("llama_odd_vocab", {"dp_shard": 2}, {"dtype": "float16"}),
    "tied, groups": ("llama_tied", {"dp_shard": 2}, {}),
    "experts by features, groups": ("qwen3_moe", {"dp_shard": 2}, {}),
    "whole experts, groups": ("qwen3_moe", {"dp_shard": 2, "ep": 2}, {}),
    "spread experts": ("qwen3_moe", {"dp_shard": 2, "ep": 4}, {}),
    "replicas": ("llama", {"tp": 1, "dp_shard": 2, "dp_replicate": 2}, {}),
}
CASES = [pytest.param(2, *way, id=f"2-{name}") for name, way in TWO.items()]
CASES += [
    pytest.param(4, *way, id=f"4-{name}", marks=pytest.mark.slow) for name, way in FOUR.items()
]


def saved(folder, family: str = "llama", edit: Any = None) -> str:
    """A checkpoint; of several files, but where one is edited."""
    model = tiny.build(family, torch.float32)
    model.save_pretrained(folder, max_shard_size="5GB" if edit else "60KB")
    if edit:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(("world", "family", "options", "kwargs"), CASES)
def test_is_what_parallelize_makes(world, family, options, kwargs, tmp_path):
    """Parameters, buffers, ties and marks; memory of their own."""
    folder = saved(tmp_path, family)
    found = pool(world).run(jobs.both_ways, folder=folder, options=options, **kwargs)
    assert found == [[]] * world


def other_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1


def head_for_embedding(tensors):
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def without(*names):
    def edit(tensors):
        for key in [key for key in tensors if any(name in key for name in names)]:
            del tensors[key]

    return edit


def cut(tensors):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:95].clone()


ODD = {
    "missing": ("llama_bias", without("0.self_attn.q_proj", "embed_tokens", "model.norm"), {}),
    "missing experts": ("qwen3_moe", without("down_proj"), {}),
    "missing twice": ("llama_tied", without("embed_tokens"), {}),
    "the other of two names": ("llama_tied", head_for_embedding, {}),
    "tied in name only": ("llama_tied", other_head, {}),
    "another shape": ("llama", cut, {"ignore_mismatched_sizes": True}),
}


@pytest.mark.parametrize(("family", "edit", "kwargs"), ODD.values(), ids=ODD)
def test_what_a_checkpoint_lacks(family, edit, kwargs, tmp_path):
    """Made as transformers makes it, from the first rank's generator."""
    folder = saved(tmp_path, family, edit)
    assert pool(2).run(jobs.both_ways, folder=folder, options={}, **kwargs) == [[]] * 2


def test_missing_with_groups(tmp_path):
    folder = saved(tmp_path, "llama", without("lm_head", "1.mlp"))
    options = {"tp": 1, "dp_shard": 2}
    assert pool(2).run(jobs.both_ways, folder=folder, options=options) == [[]] * 2


def test_keys_are_reported(tmp_path):
    def edit(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.weight"] = torch.ones(3)

    folder = saved(tmp_path, "llama", edit)
    for told in pool(2).run(jobs.loading_info, folder=folder):
        assert told["missing_keys"] == {"model.norm.weight"}
        assert told["unexpected_keys"] == {"model.layers.7.weight"}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"ep": 2}),
        ("llama", {"dp_shard": 2, "tp": 1}),
    ],
    ids=["dense", "experts_by_features", "whole_experts", "groups"],
)
def test_a_rank_reads_its_part(family, options, tmp_path):
    """To the element: what is read is what is kept."""
    folder = saved(tmp_path, family)
    for read, kept in pool(2).run(jobs.elements_read, folder=folder, options=options):
        assert read == kept


PEAKS = {
    "dense": ("llama_tied", {}, {}),
    "dense, in bfloat16": ("llama", {}, {"dtype": torch.bfloat16}),
    "experts by features, in bfloat16": ("qwen3_moe", {}, {"dtype": torch.bfloat16}),
    "whole experts, in bfloat16": ("mixtral", {"ep": 2}, {"dtype": torch.bfloat16}),
    "whole experts": ("qwen3_moe", {"ep": 2}, {}),
    "groups, in bfloat16": ("llama", {"tp": 1, "dp_shard": 2}, {"dtype": torch.bfloat16}),
    "experts in groups, in bfloat16": (
        "qwen3_moe",
        {"tp": 1, "dp_shard": 2},
        {"dtype": torch.bfloat16},
    ),
}


@pytest.mark.parametrize(("family", "options", "kwargs"), PEAKS.values(), ids=PEAKS)
def test_memory_of_a_rank(family, options, kwargs, tmp_path):
    """At most its shard and a tenth: counted, where the largest weight might come on top."""
    folder = saved(tmp_path, family)
    for found in pool(2).run(jobs.peak, folder=folder, options=options, **kwargs):
        assert found["peak"] <= 1.1 * found["shard"], found


REFUSED = {
    "device_map": ({"device_map": "auto"}, "does not take device_map", "leave device_map out"),
    "quantised": ({"load_in_4bit": True}, "load_in_4bit", "cannot be cut"),
    "native": ({"tp_plan": "auto"}, "tp_plan", "must not do it too"),
    "tp": ({"tp": 3}, "tp=3 does not make up the world", "legal:  tp=2"),
    "sp": ({"sp": 2}, "sp is a switch", "True or False"),
}


@pytest.mark.parametrize(("kwargs", "what", "more"), REFUSED.values(), ids=REFUSED)
def test_refused(kwargs, what, more, tmp_path):
    for kind, message in pool(2).run(jobs.refusal, folder=saved(tmp_path), **kwargs):
        assert kind == "ConfigError"
        assert what in message
        assert more in message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_the_files(rank, tmp_path):
    """It says what transformers says, and the other is told."""
    found = pool(2).run(jobs.refusal, folder=saved(tmp_path), on=rank)
    assert found[rank][0] == "OSError"
    assert found[1 - rank][0] == "ConfigError"
    assert f"rank {rank} refused" in found[1 - rank][1]


def test_ranks_with_other_files(tmp_path):
    """Other shapes are seen before they are read, other numbers by the replicas."""
    first, second, third = (tmp_path / name for name in "abc")

    def other(tensors):
        tensors["model.norm.weight"] += 1

    folders = [saved(first), saved(second, "llama_kv1"), saved(third, "llama", other)]
    for _, message in pool(2).run(jobs.refusal, folder=folders[0], folders=folders[:2]):
        assert "k_proj" in message
    for kind, message in pool(2).run(jobs.refusal, folder=folders[0], folders=folders[::2]):
        assert kind == "CheckpointError"
        assert "model.norm.weight" in message


def test_by_name_from_the_cache(tmp_path):
    """Without a network, by the name and the branch that a download has left there."""
    repository = tmp_path / "models--somebody--tiny"
    commit = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    saved(commit, "qwen3")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit.name)
    options = {"name": "somebody/tiny", "cache_dir": str(tmp_path)}
    assert pool(2).run(jobs.from_cache, folder=str(commit), **options) == [[]] * 2
    (kind, message), _ = pool(2).run(jobs.from_cache_refused, **{**options, "name": "nobody/tiny"})
    assert kind == "OSError"
    assert "couldn't find them in the cached files" in message


def test_another_shape(tmp_path):
    """It fits the first rank's shard."""
    folder = saved(tmp_path, "llama", cut)
    kinds = [kind for kind, _ in pool(2).run(jobs.refusal, folder=folder)]
    assert kinds == ["RuntimeError"] * 2


def test_another_layout(tmp_path):
    for kind, message in pool(2).run(jobs.other_layout, folder=saved(tmp_path)):
        assert kind == "ConfigError"
        assert "another layout" in message
        assert "Chunk" in message


def test_two_values_of_a_tied_weight_with_groups(tmp_path):
    folder = saved(tmp_path, "llama_tied", other_head)
    for kind, message in pool(2).run(jobs.refusal, folder=folder, tp=1, dp_shard=2):
        assert kind == "ConfigError"
        assert "tie_word_embeddings=False" in message


def test_takes_what_parallelize_takes():
    ours = dict(inspect.signature(hf_sp.from_pretrained).parameters)
    for name, parameter in list(inspect.signature(hf_sp.parallelize).parameters.items())[1:]:
        assert ours[name].default == parameter.default


TRAINED = (
    Case("llama", loaded=True),
    Case("llama_tied", loaded=True, optimizer="adamw", checkpoint="non_reentrant"),
    Case("qwen3", loaded=True, sp=False),
    Case("llama_tied", loaded=True, data=2),
    Case("mixtral", loaded=True, dtype="float32"),
    Case("qwen3_moe", loaded=True, dtype="float32"),
    Case("qwen3_moe", loaded=True, dtype="float32", parallelize=(("ep", 2),)),
)
SPREAD = (
    Case("llama_kv1", loaded=True, data=2),
    Case("qwen3_moe", loaded=True, data=2, dtype="float32", parallelize=(("ep", 4),)),
)
CELLS = [(2, TRAINED, i) for i in range(len(TRAINED))]
CELLS += [pytest.param(4, SPREAD, i, marks=pytest.mark.slow) for i in range(len(SPREAD))]


@pytest.mark.parametrize(("world", "cases", "index"), CELLS)
def test_trains(world, cases, index):
    """Gradients and weights of the unsharded model."""
    assert_parity([one[index] for one in run_once(world, train_all, cases=cases)])


def test_meta_model_is_filled_later():
    """``parallelize`` on meta, then ``to_empty`` and ``load_state_dict``."""
    assert_parity(pool(2).run(jobs.fills_meta, case=Case("llama_tied")))
