"""Stock Trainer over groups of tp ranks, against one process that is given all groups' batches."""

from __future__ import annotations

import pytest

from integrations import groups, groups_trl
from integrations.differences import TOLERANCE, differences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

EVALUATED = [f"{kind}_{rows}" for kind in ("eval", "predict", "loss") for rows in (7, 8, 9)]
EVALUATED += ["accumulated", "eval_stream", "smoothed", "dispatched"]
SPLIT = {"mode": "dp", "world": 4, "groups": 2}


def compare(name, job, runs, **degrees):
    """The first rank against the plain process, and the ranks against each other."""
    reports = [report[name] for report in runs.tp(job, **degrees)]
    assert differences(runs.alone("grouped")[name], reports[0]) == []
    assert all(report == reports[0] for report in reports)


@pytest.mark.parametrize("name", groups.VARIANTS)
def test_training_is_that_of_one_process(name, runs):
    """Loss, norm, rate and epoch of every step, weights, flos, tokens, counts of steps."""
    compare(name, groups.train, runs, **SPLIT)


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_is_that_of_one_process(name, runs):
    """Each row once, the last batch weighted right."""
    compare(name, groups.evaluate, runs, **SPLIT)


HYBRID = {"mode": "hybrid", "world": 4, "groups": 2, "replicas": 2}


@pytest.mark.parametrize("degrees", [SPLIT, HYBRID], ids=["shard", "replicate"])
@pytest.mark.parametrize("name", ["best", "saved", "resumed", "dispatched_run"])
def test_files_are_those_of_one_process(name, degrees, runs):
    """The best model at the end, the checkpoints left, a resume in the middle of an epoch."""
    compare(name, groups.resume, runs, **degrees)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("degrees", [SPLIT, HYBRID], ids=["shard", "replicate"])
def test_adapters_are_those_of_one_process(degrees, order, runs):
    """Adapters before ``parallelize`` and after it; a resume is the uninterrupted run."""
    compare(f"lora_{order}", groups.lora, runs, **degrees)
    found = runs.tp(groups.lora, **degrees)[0][f"lora_{order}"]
    assert found["weights_equal"]
    assert found["resumed"] == found["history"]


# Two groups of two context parallel ranks.
CONTEXT = {"mode": "cp", "world": 4, "groups": 2, "cp": 2}


@pytest.mark.parametrize(
    ("job", "name"),
    [
        (groups.resume, "best"),
        (groups.resume, "resumed"),
        (groups.lora, "lora_before"),
        (groups.lora, "lora_after"),
        (groups.long, "long"),
        (groups_trl.train, "SFTTrainer-packed"),
        (groups_trl.train, "SFTTrainer-full"),
        (groups_trl.train, "DPOTrainer-lora"),
    ],
)
def test_parts_of_a_sequence_are_those_of_one_process(job, name, runs):
    """Trained, evaluated, saved and resumed; adapters; TRL's losses of tokens."""
    compare(name, job, runs, **CONTEXT)


@pytest.mark.parametrize("ep", [1, 4])
def test_experts_are_those_of_one_process(ep, runs):
    """Split by features, and over all ranks of both groups."""
    compare(f"experts_{ep}", groups.experts, runs, **SPLIT)
    found = runs.tp(groups.experts, **SPLIT)[0][f"resumed_{ep}"]
    assert found == {"history": True, "weights_equal": True}


# A step in float32 has its rounding (1e-7 * sqrt(50) of a gradient), and AdamW's update, of a
# gradient's sign where it is small, ten times that.
IN_FLOAT32 = 1e-4


@pytest.mark.parametrize("name", ["mp_policy", "offload_policy"])
def test_policies_of_fsdp_are_those_of_one_process(name, runs):
    """Trained, evaluated, saved and resumed; the weights stay in their own dtype."""
    alone, reports = runs.alone("grouped"), runs.tp(groups.policies, **SPLIT)
    near = IN_FLOAT32 if name == "mp_policy" else TOLERANCE
    assert differences(alone[name], reports[0][name], near) == []
    assert all(report == reports[0] for report in reports)
    assert reports[0][name]["weights_equal"]


@pytest.mark.parametrize("degrees", [SPLIT, HYBRID], ids=["shard", "replicate"])
def test_accelerate_loop_is_that_of_one_process(degrees, runs):
    compare("loop", groups.loop, runs, **degrees)


@pytest.mark.parametrize("adapters", ["full", "lora"])
@pytest.mark.parametrize("trainer", ["SFTTrainer", "DPOTrainer"])
def test_trl_is_that_of_one_process(trainer, adapters, runs):
    """Losses, norms and TRL's own metrics of five clipped steps, and the weights."""
    compare(f"{trainer}-{adapters}", groups_trl.train, runs, **SPLIT)


def test_a_group_that_averages_twice_or_never_is_noticed(runs):
    found = runs.tp(groups.faults, **SPLIT)[0]["faults"]
    truth = runs.alone("grouped")["faults"]["mean"]
    assert differences(truth, found["mean"]) == []
    for fault, factor in {"twice": 0.5, "never": 2.0}.items():
        first = found[fault][0]["grad_norm"] / truth[0]["grad_norm"]
        assert abs(first / factor - 1) < 1e-4


DEGREES = {
    "of one process": ("crossed", 2, "plain-grouped"),
    "tp=4": ("tp4", 1, "dp"),
    "tp=1, dp_shard=4": ("dp4", 4, "dp"),
    "from replicas": ("crossed2", 2, "hybrid"),
}


@pytest.mark.parametrize("way", DEGREES)
def test_resume_from_another_degree(way, runs):
    mode, number, source = DEGREES[way]
    for degrees in (SPLIT, HYBRID):
        runs.tp(groups.resume, **degrees)
    saved = runs.alone("grouped")["saved"]
    for report in runs.tp(groups.cross, mode, 4, groups=number, sources=(source,)):
        found = report[source]
        assert differences({n: saved[n] for n in found}, found) == []
