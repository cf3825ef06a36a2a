"""FSDP2's mixed precision and CPU offloading, as options of ``parallelize``.

Mixed precision is exact arithmetic in a lower dtype. Weights in float64 that are gathered and
multiplied in float32, and reduced in float64, show every fault of it at float32's tolerance; in
bfloat16, which hides 1 %, the noise is held to that of an unsharded bfloat16 model, by the bound
that tests/parity/test_low_precision.py derives. Offloading changes no number.
"""

from __future__ import annotations

import adapters.jobs
import pytest
import torch
from adapters.jobs import Lora
from harness.noise import noise
from harness.parity import Case, assert_parity, train_all
from harness.pool import pool, run_once
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from data_parallel import policy_jobs as jobs
from hf_sp import checks_fsdp
from hf_sp.errors import ConfigError

pytestmark = pytest.mark.slow

# The loss in the dtype of the judge's.
LOWER = MixedPrecisionPolicy(torch.float32, torch.float64, output_dtype=torch.float64)
PRECISION = {"data": 2, "judged": "float32", "parallelize": (("mp_policy", LOWER),)}
OFFLOADED = (("offload_policy", jobs.OFFLOAD),)
CASES = (
    Case("llama", **PRECISION),
    Case("qwen3_tied", checkpoint="non_reentrant", accum=3, **PRECISION),
    Case("llama", sp=False, data=2, judged="float32").varied(
        parallelize=(("mp_policy", LOWER), ("dp_shard", None), ("dp_replicate", 2))
    ),
    Case("qwen3_moe", **PRECISION),
    Case("llama", data=2, accum=3, optimizer="adamw", parallelize=OFFLOADED),
    Case("mixtral", data=2, parallelize=(*OFFLOADED, ("ep", 2))),
)


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_training_matches_the_unsharded_model(index):
    """Gradients, norms and weights over two clipped steps."""
    per_rank = run_once(4, train_all, timeout=240, cases=CASES)
    assert_parity([reports[index] for reports in per_rank])


# One step: large steps of factors make float32's error of the first four times as large.
LORA = (
    Lora(Case("llama", steps=1, **PRECISION), "after"),
    Lora(Case("llama", data=2, parallelize=OFFLOADED), "after"),
)


@pytest.mark.parametrize("index", range(len(LORA)))
def test_adapters_that_come_later(index):
    per_rank = run_once(4, adapters.jobs.train_all, timeout=240, cases=LORA)
    assert_parity([reports[index] for reports in per_rank])


@pytest.mark.parametrize("family", ["llama_bias", "qwen3_tied"])
def test_bfloat16_over_float32_weights(family):
    case = Case(family, data=2, dtype="float32", parallelize=(("mp_policy", jobs.HALF),))
    for found in pool(4).run(noise, case=case, policy=True):
        assert 1e-3 < found["unsharded"] < 0.2, found
        assert found["parallel"] <= 1.5 * found["unsharded"], found
        assert found["worst ratio"] <= 2, found


def test_what_stays_in_float32():
    """Weights and gradients; and the output, in its own dtype, also where inference came first."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    case = Case("llama", data=2, dtype="float32", parallelize=(("mp_policy", policy),))
    assert_parity(pool(4).run(jobs.evaluates, case=case))


def test_loads_shard_by_shard(tmp_path):
    assert pool(4).run(jobs.loads, folder=str(tmp_path)) == [[]] * 4


HALF_16 = MixedPrecisionPolicy(param_dtype=torch.float16)
REFUSED = {
    "no groups": ({"mp_policy": jobs.HALF}, ["mp_policy without data parallel", "dp_shard=2"]),
    "none to offload": ({"offload_policy": jobs.OFFLOAD}, ["offload_policy without", "tp=4"]),
    "spread experts": (
        {"family": "mixtral", "tp": 2, "dp_shard": 2, "ep": 4, "offload_policy": jobs.OFFLOAD},
        ["experts that are split over the groups", "ep=1 or ep=2"],
    ),
    "float16": ({"tp": 2, "dp_shard": 2, "mp_policy": HALF_16}, ["param_dtype", "torch.bfloat16"]),
    "not a policy": (
        {"tp": 2, "dp_shard": 2, "mp_policy": "bf16"},
        ["mp_policy='bf16'", "torch.distributed.fsdp.MixedPrecisionPolicy"],
    ),
    "pinned": (
        {"tp": 2, "dp_shard": 2, "offload_policy": CPUOffloadPolicy()},
        ["without a GPU", "CPUOffloadPolicy(pin_memory=False)"],
    ),
}


@pytest.mark.parametrize(("kwargs", "parts"), REFUSED.values(), ids=REFUSED)
def test_refused(kwargs, parts):
    for message, untouched in pool(4).run(jobs.refuse, **kwargs):
        assert untouched
        assert all(part in message for part in ["ConfigError", *parts]), message


def test_a_process_group_that_has_no_cpu(monkeypatch):
    """NCCL's alone, which a launcher's script starts; gloo beside it is enough."""
    monkeypatch.setattr(checks_fsdp.dist, "get_backend_config", lambda: "cuda:nccl")
    with pytest.raises(ConfigError, match="init_process_group\\('cpu:gloo,cuda:nccl'\\)"):
        checks_fsdp.check_backends(jobs.OFFLOAD)
    checks_fsdp.check_backends(None)
    monkeypatch.setattr(checks_fsdp.dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    checks_fsdp.check_backends(jobs.OFFLOAD)
