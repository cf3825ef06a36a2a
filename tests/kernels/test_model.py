"""The kernels where they are used: every gradient of a parallel model that runs them.

The rest of the suite runs their torch counterparts. Here the same model runs Triton, interpreted,
and the launches are counted, so that a silent way around the kernels would show.
"""

from __future__ import annotations

import pytest
from harness.pool import pool
from harness.report import assert_parity

from kernels import model_jobs


@pytest.mark.parametrize("sp", [True, False])
@pytest.mark.parametrize("family", ["llama_odd_vocab", "qwen3"])
def test_a_step_with_triton(family, sp):
    pytest.importorskip("triton")
    results = pool(2).run(model_jobs.step, family=family, sp=sp, dtype="float32")
    assert_parity([report for report, _ in results])
    for _, launches in results:
        norms = 5 + (4 if family == "qwen3" else 0)
        forward = sum(n for k, n in launches.items() if "norm" in k and "backward" not in k)
        # Once forward, and again in backward for the two that feed a block's linears in each layer.
        assert forward == norms + 4, launches
        assert sum(n for k, n in launches.items() if "norm" in k and "backward" in k) == norms
        assert sum(n for k, n in launches.items() if "swiglu" in k) == 2 * 2
        assert sum(n for k, n in launches.items() if "statistics" in k) >= 1
        assert sum(n for k, n in launches.items() if "gradient" in k) >= 1
