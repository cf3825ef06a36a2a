"""Starts the worker script once in each mode; the tests read its reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")


def start(mode, out, ranks=None, timeout=600, worker=WORKER):
    """Run the worker; its report of every rank."""
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [*launcher, str(worker), mode, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"worker {mode} failed\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return [json.loads((out / f"{mode}-{r}.json").read_text()) for r in range(ranks or 1)]


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    """Reports by mode, each a list over ranks, and the folder that they wrote to."""
    out = tmp_path_factory.mktemp("integrations")
    return {
        "out": out,
        "plain": start("plain", out),
        "one": start("one", out),
        "tp": start("tp", out, ranks=2),
        "back": start("back", out),
        "four": start("four", out, ranks=4),
    }
