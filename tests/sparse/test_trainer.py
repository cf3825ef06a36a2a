"""A sparse model in the stock Trainer: losses, norms, weights and a resumed run of one process.

float32 sums in another order: 1.2e-7 * sqrt(64) in a step's matrices, some tens of which follow one
another, over four clipped Adam steps of 1e-3: 1e-5 of a loss, 1e-4 of a weight.
"""

from __future__ import annotations

import warnings

import pytest
from harness.pool import run_on_ranks
from integrations.scene import launched
from safetensors.torch import load_file

from sparse import trainer_jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("sparse")
    with launched(0, 1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reports = {"one": [trainer_jobs.train("one", out)]}
    for mode in ("split", "whole", "back"):
        reports[mode] = run_on_ranks(2, trainer_jobs.on_rank, mode=mode, out=str(out))
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
