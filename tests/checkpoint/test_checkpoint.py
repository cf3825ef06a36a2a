"""Checkpoints: complete or not there, read without executing anything, resumed at any degree."""

from __future__ import annotations

import shutil

import pytest
import torch
from harness.pool import pool

from checkpoint import jobs, torch_tools

WAYS = {
    "llama": ("llama", {}),
    "lora": ("lora", {}),
    "experts by features": ("qwen3_moe", {"ep": 1}),
    "whole experts": ("qwen3_moe", {"ep": 2}),
}


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: way.replace(" ", "_"))
def run(request, tmp_path_factory):
    """A run over two ranks that saved each of its steps."""
    kind, options = WAYS[request.param]
    folder = tmp_path_factory.mktemp("run")
    found = pool(2).run(jobs.trains, folder=str(folder), kind=kind, options=options)
    return folder, kind, options, found[0]


def resumes(run, world, **kwargs):
    folder, kind, options, _ = run
    more = {"options": options if world == 2 else {}, "save_strategy": "no", **kwargs}
    resume = str(folder / "checkpoint-2")
    return pool(world).run(jobs.trains, folder=str(folder), kind=kind, resume=resume, **more)


def test_resumed_run_is_the_uninterrupted_one(run):
    """Bit for bit; from other weights, where the checkpoint has all of them."""
    *_, kind, _, whole = run
    for found in resumes(run, 2, seed=0 if kind == "lora" else 5):
        assert found["history"] == whole["history"]
        assert all(torch.equal(found["weights"][n], w) for n, w in whole["weights"].items())


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_resumed_at_another_degree(run, world):
    """The losses are logged in float32."""
    for found in resumes(run, world):
        for mine, theirs in zip(found["history"], run[-1]["history"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_loop_with_groups_is_resumed_at_any_degrees(kind, tmp_path):
    """Saved by 2 groups of 2; experts over all ranks, by features, and whole."""
    sparse = kind != "llama"
    spread = {"tp": 2, "dp_shard": 2, **({"ep": 4} if sparse else {})}
    want = pool(4).run(jobs.loop_saves, folder=str(tmp_path), kind=kind, **spread)[0]["losses"]
    ways = [(1, {}), (2, {}), (2, {"dp_shard": 2, "tp": 1}), (4, {"ep": 4} if sparse else {})]
    for world, options in ways:
        found = pool(world).run(jobs.loop_resumes, folder=str(tmp_path), kind=kind, **options)
        assert found[0]["losses"] == pytest.approx(want, rel=1e-6)


# --- complete, or refused -----------------------------------------------------------------------

WORDS = {
    "weights cut": "model.safetensors has",
    "weights garbled": "model.safetensors is not what was saved",
    "weights missing": "model.safetensors is missing",
    "weights of another step": "model.safetensors is not what was saved",
    "shard cut": f"{jobs.SHARD} has",
    "shard garbled": f"{jobs.SHARD} is not what was saved",
    "shard missing": f"{jobs.SHARD} is missing",
    "optimizer missing": "optimizer_shards/index.json is missing",
    "schedule missing": "scheduler.pt is missing",
    "schedule of another step": "scheduler.pt is not what was saved",
    "random state of one rank cut": "rng_state_1.pth has",
    "trainer state cut": "trainer_state.json has",
    "manifest missing": "hf_sp_manifest.json is missing",
    "manifest cut": "JSONDecodeError",
    "manifest of a later format": "format 2, this version reads 1",
    "manifest leads out": "a path outside of the checkpoint",
    "manifest of nonsense": "hf_sp_manifest.json",
    "another model": "model.norm.weight: [33] in the checkpoint, [32] in the model",
    "of an earlier version": "of an earlier version of hf_sp, read by unpickling",
    "stock without schedule": "scheduler.pt is missing",
    "stock without trainer state": "neither hf_sp_manifest.json nor trainer_state.json",
    "stock index leads out": "a path outside of the checkpoint",
    "optimizer leads out": "a path outside of the checkpoint",
    "optimizer has holes": "elements",
}


@pytest.mark.slow
def test_damage_is_refused_on_all_ranks_before_the_model_is_touched(tmp_path):
    answers = pool(2).run(jobs.damaged, folder=str(tmp_path), damages=tuple(jobs.DAMAGES))
    assert WORDS.keys() == jobs.DAMAGES.keys()
    for name, one, other in zip(jobs.DAMAGES, *answers, strict=True):
        text, untouched = one
        assert text.startswith("CheckpointError"), (name, text)
        assert WORDS[name] in text, (name, text)
        assert "checkpoint-2" in text
        assert one == other or name in jobs.FORGED, name
        # What is forged is found when the optimizer is read: its state stays, the weights are in.
        assert untouched or name in jobs.FORGED, name


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["hf", "dcp"])
def test_nothing_in_a_checkpoint_is_executed(checkpoint, tmp_path):
    answers = pool(2).run(jobs.planted, folder=str(tmp_path), checkpoint=checkpoint)[0]
    assert not (tmp_path / "executed").exists()
    assert len(answers) > 20
    # What is not read cannot hurt.
    unread = {k.split()[0] for k, v in answers.items() if v == "resumed"}
    assert unread <= {
        "config.json", "generation_config.json", "training_args.bin", "optimizer_dcp/.metadata",
    }, answers  # fmt: skip


@pytest.mark.slow
def test_the_last_complete_one_is_taken(tmp_path):
    answers = pool(2).run(jobs.passes_over, folder=str(tmp_path))
    for steps, _, nothing in answers:
        assert steps == "[2]"
        assert "there is no complete checkpoint" in nothing
        assert "checkpoint-1: model.safetensors" in nothing
    # One rank says it.
    said = [[line for line in told if "checkpoint-3" in line] for _, told, _ in answers]
    assert len(said[0]) == 1
    assert jobs.SHARD in said[0][0]
    assert not said[1]


# --- saving that fails --------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_save_loses_nothing(rank, tmp_path):
    """Each thing that is done to the disk fails in turn, on one rank: all hear of it."""
    one, other = pool(2).run(jobs.fails_to_save, folder=str(tmp_path), rank=rank)
    assert one["left"] == ["checkpoint-1"]
    assert one["outcomes"] == other["outcomes"]
    assert len(one["outcomes"]) >= (20 if rank == 0 else 4)
    told = [text for text in one["outcomes"] if text]
    assert len(told) >= len(one["outcomes"]) - 4  # removing what is left over may fail
    assert all(f"rank {rank}: OSError" in text for text in told)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "lora"])
def test_a_full_disk_and_a_file_in_the_way(kind, tmp_path):
    one, other = pool(2).run(jobs.limited, folder=str(tmp_path), kind=kind)
    assert one == other
    assert len(one) == 6
    for text in one:
        assert text.startswith("CheckpointError"), one
        assert "rank 0: " in text
    assert "a file" in one[4]
    assert "a file" in one[5]


@pytest.mark.slow
def test_a_kill_leaves_the_old_one_or_the_new_one(tmp_path):
    (states,) = pool(1).run(jobs.killed, folder=str(tmp_path))
    assert states[-1] == "finished"
    kinds = states[:-1]
    assert kinds == sorted(kinds, key=("old", "new").index)
    assert kinds.count("old") >= 20
    assert kinds.count("new") >= 2


def test_a_lone_save_does_not_spoil_the_next(tmp_path):
    text, *files = pool(2).run(jobs.lone_save, folder=str(tmp_path))[0]
    assert "no call from ranks [1]" in text
    assert "model.safetensors" in files


@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_are_deleted_and_never_the_new_one(limit, tmp_path):
    """A run in the folder of another one that came further."""
    (tmp_path / "checkpoint-100").mkdir()
    pool(2).run(jobs.trains, folder=str(tmp_path), save_total_limit=limit, max_steps=3)
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["checkpoint-2", "checkpoint-3"][-limit:]


# --- what saving costs --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen3_moe"])
def test_one_file_is_in_memory(kind, tmp_path):
    """And, for experts that are written one by one, the packed tensor that is being cut."""
    size = 60_000
    first, second = pool(2).run(jobs.peak, folder=str(tmp_path), kind=kind, size=size)
    assert first["files"] >= 4
    assert first["peak"] <= size + (first["largest"] if kind == "qwen3_moe" else 0)
    assert second["peak"] <= first["largest"]


# --- torch's own tools ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("qwen3_moe", {}), ("qwen3_moe", {"ep": 2})]
)
def test_torch_tools(family, options, tmp_path):
    """They take a rank's part for one rectangle; of packed experts it is two."""
    ranks = pool(2).run(torch_tools.models, folder=str(tmp_path), family=family, **options)
    assert [name for found in ranks for name, wrong in found.items() if wrong] == []
    # The first rank alone is given the whole, and reads the one file.
    assert [len(found) for found in ranks] == [7, 5]
    if family != "llama" and not options:
        assert pool(2).run(torch_tools.optimizers, family=family) == [[], []]


# --- the way back -------------------------------------------------------------------------------


# An adapter's folder has no base model: that a run of one rank goes on from it is tested above.
@pytest.mark.parametrize("run", [way for way in WAYS if way != "lora"], indirect=True)
def test_stock_trainer_goes_on(run, tmp_path):
    """In a process that never heard of hf_sp, from the consolidated folder."""
    from hf_sp.consolidate import main

    folder, kind, _, whole = run
    copy = tmp_path / "checkpoint-2"
    shutil.copytree(folder / "checkpoint-2", copy)
    main([str(copy)])
    found = pool(1).run(jobs.stock_trains, folder=str(tmp_path), kind=kind, resume=str(copy))[0]
    for mine, theirs in zip(found, whole["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("world", [2, 1])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_weights_in_several_files(kind, world, tmp_path):
    """Experts are written one by one, and those of one layer lie in several of them."""
    way = {"folder": str(tmp_path), "kind": kind}
    whole = pool(world).run(jobs.many_files, **way)[0]
    assert whole["files"] > 5
    resume = str(tmp_path / "checkpoint-2")
    found = pool(world).run(jobs.many_files, **way, seed=5, resume=resume)[0]
    assert found["history"] == whole["history"]
    assert all(torch.equal(found["weights"][n], w) for n, w in whole["weights"].items())
