"""What a stock Trainer over a parallelized model writes, and resumes from, at any degree."""

from __future__ import annotations

import pytest

from integrations import checkpoints, optimizer_state
from integrations.differences import TOLERANCE, differences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def reports(mode, job, runs):
    """The reports of all ranks of a mode."""
    return runs.tp(job) if mode == "tp" else [runs.alone("one")[job.__name__]]


@pytest.mark.parametrize("mode", ["tp", "one", "plain"])
def test_resumed_run_is_the_uninterrupted_one(mode, runs):
    all_ranks = (
        [runs.alone("plain")] if mode == "plain" else reports(mode, checkpoints.resume, runs)
    )
    for report in all_ranks:
        assert report["resumed"]["weights_equal"]
        assert report["resumed"]["history"] == report["saved"]["history"]


@pytest.mark.parametrize("mode", ["tp", "one"])
def test_resume_restores_every_ranks_random_state(mode, runs):
    for report in reports(mode, checkpoints.dropout_resume, runs):
        assert report["weights_equal"]
        assert report["history"]


def test_checkpoint_has_one_plain_model_and_sharded_optimizer_state(runs):
    files = runs.tp(checkpoints.dropout_resume)[0]["files"]
    assert {"model.safetensors", "optimizer_shards", "scheduler.pt", "trainer_state.json"} <= {
        *files
    }
    assert "optimizer.pt" not in files


@pytest.mark.parametrize("kind", ["whole", "sharded", "tied"])
@pytest.mark.parametrize("mode", ["tp", "one"])
def test_saved_model_loads_in_plain_transformers_bit_for_bit(mode, kind, runs):
    for report in reports(mode, checkpoints.save, runs):
        saved = report[kind]
        assert saved["equal"]
        assert saved["loaded"]
        assert not saved["config"]
        assert saved["tied"] == (kind == "tied")
        assert (saved["files"] > 1) == (kind == "sharded")
        # Logits of size 10 after 2 layers in float32.
        assert saved["logits"] < 1e-4


def test_saved_dtype_is_kept(runs):
    assert runs.tp(checkpoints.save)[0]["bf16"] == {"dtype": "torch.bfloat16", "equal": True}


def test_wrong_shape_is_refused_before_anything_is_loaded(runs):
    for report in runs.tp(checkpoints.save):
        assert report["wrong"]["type"] == "CheckpointError"
        assert "model.layers.1.mlp.up_proj.weight: (3, 4)" in report["wrong"]["message"]
        assert report["wrong"]["untouched"]


def test_copy_of_the_model_loads_into_itself(runs):
    for report in runs.tp(checkpoints.save):
        assert report["wrong"]["deepcopy"]


@pytest.mark.parametrize("kind", ["adamw", "fused", "sgd", "momentum", "amsgrad"])
def test_optimizer_state_of_uneven_and_empty_shards(kind, runs):
    assert all(report[kind] for report in runs.tp(optimizer_state.optimizer_state))


def test_optimizer_state_that_does_not_fit_is_refused(runs):
    for report in runs.tp(optimizer_state.optimizer_state):
        assert report["misfit"]["type"] == "CheckpointError"
        assert "norm: in the checkpoint only" in report["misfit"]["message"]
        assert report["plain_state"]["type"] == "CheckpointError"
        assert "row.codes" in report["plain_state"]["message"]


def test_one_process_state_that_does_not_fit_is_refused(runs):
    assert runs.alone("plain")["resumed"]
    for report in runs.tp(checkpoints.tampered):
        assert report["type"] == "CheckpointError"
        assert "exp_avg: (60, 16)" in report["message"]


RESUMED = {
    ("tp", 2): ("plain", "one"),
    ("back", 1): ("tp",),
    ("four", 4): ("plain", "tp"),
}


@pytest.mark.parametrize(
    ("mode", "world", "source"),
    [(*degree, source) for degree, sources in RESUMED.items() for source in sources],
)
def test_resume_from_another_degree(mode, world, source, runs):
    runs.tp(checkpoints.resume)
    saved = runs.alone("plain")["saved"]["history"]
    sources = RESUMED[mode, world]
    for report in runs.tp(checkpoints.cross, mode, world, sources=sources):
        resumed = report[source]
        assert resumed["error"] < TOLERANCE
        assert differences(saved, resumed["history"]) == []


def test_one_process_of_ours_resumes_from_stock_trainer(runs):
    resumed = runs.alone("one")["cross"]["plain"]
    assert resumed["error"] < TOLERANCE
    assert differences(runs.alone("plain")["saved"]["history"], resumed["history"]) == []


def test_save_model_and_save_only_model(runs):
    for report in runs.tp(checkpoints.save_model):
        assert report["equal"]
        assert "model.safetensors" in report["files"]
        assert not [f for f in report["files"] if "optim" in f or "rng" in f]


def test_lone_save_pretrained_says_so(runs):
    found = runs.tp(checkpoints.misuse)[0]
    assert found["type"] == "CheckpointError"
    assert "no call from ranks [1]" in found["message"]
    assert not found["written"]
