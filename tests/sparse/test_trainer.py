"""A sparse model in the stock Trainer: losses, norms, weights and a resumed run of one process.

float32 sums in another order: 1.2e-7 * sqrt(64) in a step's matrices, some tens of which follow one
another, over four clipped Adam steps of 1e-3: 1e-5 of a loss, 1e-4 of a weight.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from integrations.conftest import start
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse")
    ranks = {"one": None, "split": 2, "whole": 2, "back": 2}
    reports = {mode: start(mode, out, n, worker=WORKER) for mode, n in ranks.items()}
    return out, reports


@pytest.mark.parametrize("mode", ["split", "whole", "back"])
def test_training_is_that_of_one_process(runs, mode):
    out, reports = runs
    want = reports["one"][0]["steps"]
    assert len(want) == 4
    for report in reports[mode]:
        for mine, theirs in zip(report["steps"], want, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
    one, other = (load_file(out / name / "final/model.safetensors") for name in ("one", mode))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() <= 1e-4 * tensor.norm(), name


def test_load_per_expert(runs):
    _, reports = runs
    first, second = (reports["whole"][rank]["load"] for rank in (0, 1))
    assert first == second
    assert set(first) == {"model.layers.0.mlp.experts", "model.layers.2.mlp.experts"}
    # The latest micro-batch: two rows of 33 tokens, two experts each.
    assert all(sum(counts) == 2 * 33 * 2 for counts in first.values())
