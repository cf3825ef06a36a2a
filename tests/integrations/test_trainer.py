"""Stock Trainer and accelerate on two ranks against the same script in one process."""

from __future__ import annotations

import pytest

from integrations import accelerate_loop, checkpoints, evaluation, refusals, training
from integrations.differences import differences

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# bfloat16 keeps 8 bits, and the two sides round different partial sums.
# Under bf16 autocast one process is up to 5.1 % of the gradient (12 seeds of this model)
# away from float32's, and that of two ranks as much: twice that from each other.
LOOSE = {"bf16": 0.102, "full_eval": 1e-2}

JOBS = {
    "train": training.train,
    **dict.fromkeys([*training.VARIANTS, "tied", "model_init", "bf16"], training.variants),
    "saved": checkpoints.resume,
}
EVALUATED = [
    "eval_first",
    "predict",
    "eval_loss_only",
    "eval_accumulated",
    "eval_stream",
    "eval_inputs",
    "eval_batched",
    "eval_smoothed",
    "eval_dispatched",
    "full_eval",
]
TRAINED = list(JOBS)
JOBS |= {**dict.fromkeys(EVALUATED, evaluation.evaluate), "best": evaluation.best}


def compare(name, runs):
    """The first rank against the plain process, and the ranks against each other."""
    first, second = (report[name] for report in runs.tp(JOBS[name]))
    assert differences(runs.alone("plain")[name], first, **tolerance(name)) == []
    assert first == second


def tolerance(name):
    return {"tolerance": LOOSE[name]} if name in LOOSE else {}


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_that_of_one_process(name, runs):
    """Loss, grad_norm, rate and epoch of every step, weights, flos, tokens, step counts."""
    compare(name, runs)


@pytest.mark.parametrize("name", [n for n in JOBS if n not in TRAINED])
def test_evaluation_is_that_of_one_process(name, runs):
    """No row twice, ragged last batch weighted right."""
    compare(name, runs)


def test_clipping_was_active(runs):
    assert all(step["grad_norm"] > 0.5 for step in runs.alone("plain")["train"]["history"])


def test_predictions_have_each_row_once(runs):
    assert runs.tp(evaluation.evaluate)[0]["predict"]["rows"][0] == 7


def test_total_batch_size_counts_data_parallel_ranks_only(runs):
    mine, plain = runs.tp(training.train)[0], runs.alone("plain")
    assert mine["train"]["batch_size"] == plain["train"]["batch_size"] == 4


def test_compiled_training_is_the_eager_one(runs):
    """``torch_compile=True``: every layer is compiled, and nothing around them.

    aot_eager runs the eager layer's operators, some decomposed: the same float64 sums.
    """
    name = "three_steps"
    found = zip(runs.tp(training.compiled), runs.tp(training.variants), strict=True)
    for report, eager in found:
        assert len(report["compiled"]["history"]) == 3
        assert all("grad_norm" in step for step in report["compiled"]["history"])
        assert differences(eager[name], report["compiled"]) == []
        assert differences(runs.alone("plain")[name], report["compiled"]) == []
        graphs = report["made"].pop("graphs")
        assert report["made"] == {"layers": 2, "model": "LlamaForCausalLM", "breaks": 0}
        # Of a layer: its forward, the hook before it, and that hook once more, as the first and
        # the last layer's are not alike. None for each of the three steps.
        assert 2 <= graphs <= 2 * 3


def test_whole_logits_are_made_only_when_read(runs):
    for report in runs.tp(evaluation.whole_logits):
        assert report == {"loss_only": 0, "metrics": 4, "bf16_training": 0}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("optimizer", "after parallelize(model)"),
        ("liger", "use_liger_kernel"),
        ("parallelism_config", "tp_size=2"),
        ("sp_size", "DeepSpeed Ulysses"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED"),
    ],
)
def test_refused_on_every_rank_alike(case, words, runs):
    first, second = (report[case] for report in runs.tp(refusals.refusals))
    assert first == second
    assert first["type"] == "ConfigError"
    assert words in first["message"]


def test_agreeing_parallelism_config_is_taken(runs):
    assert runs.tp(refusals.agreeing) == [1, 1]


def test_other_trainers_in_the_process_are_left_alone(runs):
    assert runs.tp(refusals.others) == [[2, 1]] * 2


def test_accelerate_loop_is_that_of_one_process(runs):
    for report in runs.tp(accelerate_loop.loop):
        assert differences(runs.alone("plain")["accelerate"], report["accelerate"]) == []
        assert report["accelerate"]["saved"]
        assert report["accelerate"]["wrapped"] == "LlamaForCausalLM"


def test_loader_prepared_before_the_model_is_refused(runs):
    for report in runs.tp(accelerate_loop.loader_first):
        assert report["type"] == "ConfigError"
        assert "a data loader was prepared before" in report["message"]
