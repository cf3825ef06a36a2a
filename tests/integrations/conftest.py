"""Both sides of every comparison: the plain process, and jobs on the ranks of the pools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness.pool import run_once

from integrations import jobs

ROOT = Path(__file__).resolve().parents[2]
PLAIN = Path(__file__).with_name("plain.py")
TIMEOUT_S = 600


def environment():
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


class Runs:
    """Reports of jobs, each run once, when a test first asks for it.

    The plain process starts with the first job of the ranks and works beside them: ask for theirs
    first.
    """

    def __init__(self, out):
        self.out = out
        self._process = None

    def tp(self, job, mode="tp", world=2, **kwargs):
        """The report of every rank. With another mode, it must not write where one has written."""
        self._start()
        known = {"job": jobs.name_of(job), "mode": mode, "out": str(self.out), **kwargs}
        return run_once(world, jobs.on_rank, timeout=TIMEOUT_S, **known)

    def alone(self, side):
        """What the plain process reports: ``plain``, ``grouped``, ``one`` (tp=1, no torchrun)."""
        self._start()
        if self._process.wait(TIMEOUT_S):
            pytest.fail(f"the plain process failed\n{(self.out / 'plain.log').read_text()[-6000:]}")
        return json.loads((self.out / "plain.json").read_text())[side]

    def _start(self):
        if self._process is None:
            with (self.out / "plain.log").open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, str(PLAIN), str(self.out)],
                    env=environment(),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )

    def close(self):
        """End the plain process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    both = Runs(tmp_path_factory.mktemp("integrations"))
    yield both
    both.close()
