"""What the compiler makes of the kernels for sm_90 (H100, H200); no GPU is needed for that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGISTERS_PER_SM = 65536


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    import os

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Compiled anew: a cache might hold another version's answer.
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.kernels.sm_90"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_nothing_spills(compiled):
    assert {label: kernel["stack"] for label, kernel in compiled.items() if kernel["stack"]} == {}


# Programs that fit on a multiprocessor at once by registers. Each limit is one that a worse tile or
# a lost specialisation would break, and that the compilers of triton 3.6 to 3.9 keep.
RESIDENT = {
    "forward 128": 8,
    "forward 512": 8,
    "forward 896": 8,
    "forward 2048": 8,
    "forward 4096": 8,
    "forward 5120": 4,
    "forward 8192": 4,
    "forward 16384": 2,
    "backward 128": 4,
    "backward 512": 7,
    "backward 896": 8,
    "backward 2048": 5,
    "backward 4096": 2,
    "backward 5120": 1,
    "backward 8192": 1,
    "swiglu": 16,
}


def test_registers(compiled):
    seen = set()
    for label, kernel in compiled.items():
        if "fp32" in label:
            continue
        limit = "swiglu" if "swiglu" in label else " ".join(label.split()[-2:])
        seen.add(limit)
        # Registers are given out by 256 per warp.
        per_warp = -(-kernel["registers"] * 32 // 256) * 256
        resident = REGISTERS_PER_SM // (per_warp * kernel["warps"])
        assert resident >= RESIDENT[limit], (label, kernel)
    assert seen == set(RESIDENT)


def test_loads_are_wide_and_pipelined(compiled):
    for label, kernel in compiled.items():
        # 16 bytes per thread; rstd of rows of heads is one number each, and may be narrow.
        assert kernel["vector"] >= 2, label
        assert kernel["narrow"] <= 1, label
        if "backward" in label and "swiglu" not in label:
            assert kernel["async"] >= 4, f"{label}: the loop over rows waits for its loads"
