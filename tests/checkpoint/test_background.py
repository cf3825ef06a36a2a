"""``checkpoint="dcp"``: written while training goes on, read by torch's tools, and the way back."""

from __future__ import annotations

import shutil

import pytest
import torch
from harness.pool import pool

from checkpoint import background_jobs, jobs

WAYS = {"llama": ("llama", {}), "packed_experts": ("qwen3_moe", {"ep": 1})}


@pytest.fixture(scope="module", params=WAYS)
def run(request, tmp_path_factory):
    """A run over two ranks that saved each of its steps, while it took the next."""
    kind, options = WAYS[request.param]
    folder = tmp_path_factory.mktemp("run")
    found = pool(2).run(background_jobs.trains, folder=str(folder), kind=kind, options=options)
    return folder, kind, options, found[0]


def test_training_goes_on_meanwhile(run):
    names = [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    assert run[-1]["seen"] == [[], [], names[:1], names[:2], names]


@pytest.mark.parametrize("world", [2, 1])
def test_resumed_run_is_the_uninterrupted_one(run, world):
    """What was saved is what was there when it was saved, though it was written later."""
    folder, kind, options, whole = run
    more = {"kind": kind, "seed": 5, "save_strategy": "no", "resume": f"{folder}/checkpoint-2"}
    more["options"] = options if world == 2 else {}
    found = pool(world).run(jobs.trains, folder=str(folder), **more)[0]
    for mine, theirs in zip(found["history"], whole["history"], strict=True):
        assert mine == (theirs if world == 2 else pytest.approx(theirs, rel=1e-6))
    if world == 2:
        assert all(torch.equal(found["weights"][n], w) for n, w in whole["weights"].items())


def test_mutant_that_copies_nothing_is_noticed(tmp_path):
    whole = pool(2).run(
        background_jobs.trains, folder=str(tmp_path), kind="llama", options={}, copies=False
    )
    resume = f"{tmp_path}/checkpoint-2"
    found = pool(2).run(jobs.trains, folder=str(tmp_path), save_strategy="no", resume=resume)
    assert found[0]["history"][2:] != whole[0]["history"][2:]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ep"), [("llama", 1), ("qwen3_moe", 4)])
def test_data_parallel_groups(kind, ep, tmp_path):
    """Of FSDP's shards, and of experts over all ranks; resumed by as many groups of one rank."""
    options = {"tp": 2, "dp_shard": 2, "ep": ep}
    way = {"folder": str(tmp_path), "kind": kind}
    whole = pool(4).run(background_jobs.trains, **way, options=options)[0]
    options = {"tp": 1, "dp_shard": 2, "ep": 2 if ep > 1 else 1}
    resume = f"{tmp_path}/checkpoint-2"
    for found in pool(2).run(
        jobs.trains, **way, options=options, save_strategy="no", resume=resume
    ):
        for mine, theirs in zip(found["history"], whole["history"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)


def test_torch_reads_it(run):
    folder, kind, options, _ = run
    wrong = pool(2).run(
        background_jobs.read_by_torch, folder=str(folder), kind=kind, options=options
    )
    assert wrong == [[], []]


def test_consolidated_it_is_plain(run, tmp_path):
    from hf_sp.commands.main import main

    folder, kind, _, whole = run
    for step in (2, 4):
        copy = tmp_path / f"checkpoint-{step}"
        shutil.copytree(folder / copy.name, copy)
        main(["consolidate", str(copy)])
    assert background_jobs.plain(str(copy), whole["weights"]) == []
    resume = str(tmp_path / "checkpoint-2")
    found = pool(1).run(jobs.stock_trains, folder=str(tmp_path), kind=kind, resume=resume)[0]
    for mine, theirs in zip(found, whole["history"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)


def test_a_rank_that_cannot_write_is_told_to_all(tmp_path):
    for found in pool(2).run(background_jobs.fails, folder=str(tmp_path)):
        assert "rank 1: OSError: [Errno 28] No space left on device" in found["text"]
        assert found["left"] == ["checkpoint-1", "checkpoint-3"]
