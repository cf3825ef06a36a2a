"""``Accelerator.save_state`` and ``load_state``: complete or not there, at any degree."""

from __future__ import annotations

import pytest
import torch
from harness.pool import pool

from checkpoint import accelerate_jobs as jobs

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(
    scope="module", params=["llama", "lora", pytest.param("qwen3_moe", marks=pytest.mark.slow)]
)
def saved(request, tmp_path_factory):
    """A run over two ranks that saved its second step."""
    folder = str(tmp_path_factory.mktemp("run") / "state")
    return folder, request.param, pool(2).run(jobs.saves, folder=folder, kind=request.param)[0]


def test_loaded_run_is_the_uninterrupted_one(saved):
    """Bit for bit: weights, optimizer, schedule, random generators, registered object."""
    folder, kind, whole = saved
    for found in pool(2).run(jobs.loads, folder=folder, kind=kind):
        assert found["steps"] == whole["steps"][2:]
        assert found["counter"] == 2
        assert all(torch.equal(found["weights"][n], w) for n, w in whole["weights"].items())


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_loaded_at_another_degree(saved, world):
    folder, kind, whole = saved
    for found in pool(world).run(jobs.loads, folder=folder, kind=kind):
        for mine, theirs in zip(found["steps"], whole["steps"][2:], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)


def test_names_limit_and_last_complete_checkpoint(tmp_path):
    for found in pool(2).run(jobs.automatic, folder=str(tmp_path)):
        assert found["names"] == ["checkpoint_1", "checkpoint_2"]
        assert found["again"] == found["wanted"]
        assert found["next"] != found["again"]
        assert "the next checkpoint is there already" in found["taken"]
        assert "save_state was given no folder" in found["unnamed"]


def test_hooks_and_several_models(tmp_path):
    for found in pool(2).run(jobs.hooks, folder=str(tmp_path / "state")):
        assert found["same"] == [True, True]
        assert {"own", "model.safetensors", "optimizer_shards"} <= {*found["names"]}
        assert "model_1.safetensors" not in found["names"]


def test_tied_head(tmp_path):
    assert pool(2).run(jobs.tied, folder=str(tmp_path / "state")) == [True, True]


def test_refusals(tmp_path):
    for found in pool(2).run(jobs.refusals, folder=str(tmp_path)):
        assert "custom_checkpoint_0.pkl" in found["object"]
        assert "a registered object holds shards" in found["shards"]
        assert not found["nothing"]
        assert "No space left on device" in found["full"]
        assert {"notes.txt", "optimizer_shards", "model.safetensors"} <= {*found["names"]}
        assert "executes what is in the files" in found["executing"]
        assert "1 registered objects, here 0" in found["fewer"]
        assert "custom_checkpoint_0.pkl" in found["forged"]
        assert found["untouched"]
        assert not found["executed"]
        assert "hf_sp_manifest.json" in found["stock"]
