"""The loss's kernels as a GPU would run them: registers, spills, and bytes per logit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sp.kernels import cross_entropy_triton

# 2048 threads of an SM share 65536 registers. The plain kernels keep every thread (gradient) or
# half of them and more; a cap takes more, and never spills.
CEILINGS = {
    "statistics 18992 torch.bfloat16 cap=0": 56,
    "statistics 18992 torch.float32 cap=0": 56,
    "gradient 18992 torch.bfloat16 cap=0": 32,
    "gradient 18992 torch.float32 cap=0": 32,
    "gradient 18992 torch.bfloat16 cap=30": 64,
}
OTHERS = 112


@pytest.fixture(scope="module")
def compiled():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.cross_entropy_sm_90"],
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_registers_and_spills(compiled):
    assert len(compiled) == 12
    assert compiled.keys() >= CEILINGS.keys()
    for label, found in compiled.items():
        assert found["stack"] == 0, f"{label} spills: {found}"
        assert found["registers"] <= CEILINGS.get(label, OTHERS), f"{label}: {found}"


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_each_logit_is_moved_three_times(compiled, dtype, size):
    """Read for the statistics, read and written for the gradient: 6 bytes of bfloat16.

    Counted in the code of one program, in vectors of 16 bytes a thread. Beside them the statistics
    read one logit alone, the target's.
    """
    for kernel, config, times in (
        ("statistics", cross_entropy_triton.STATISTICS, 1),
        ("gradient", cross_entropy_triton.GRADIENT, 2),
    ):
        for form in ("cap=0", "cap=30"):
            found = compiled[f"{kernel} 18992 torch.{dtype} {form}"]
            assert found["vector"] * 16 * 32 * config.warps == times * size * config.block
            assert found["narrow"] == (1 if kernel == "statistics" and size == 2 else 0)
