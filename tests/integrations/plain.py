"""The script that the other side of every comparison runs: ``python plain.py OUT``.

The unmodified model in one process that has never seen hf_sp; then, with hf_sp, the checkpoints of
degree one, without torchrun. Reports JSON.
"""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
from harness.pool import freeze_imports  # noqa: E402

from integrations import checkpoints, jobs  # noqa: E402
from integrations.scene import Scene, launched  # noqa: E402

ONE = (checkpoints.resume, checkpoints.save, checkpoints.dropout_resume, checkpoints.cross)


def run(scene, job):
    started = time.monotonic()
    random.seed(0)
    freeze_imports()
    report = job(scene)
    print(f"{scene.mode} {job.__name__} {time.monotonic() - started:.1f} s", flush=True)
    return report


def main(out):
    torch.set_num_threads(1)
    with launched(0, 1):
        plain = {}
        for job in jobs.PLAIN:
            plain |= run(Scene("plain", out), job)
        grouped = {}
        for job in jobs.GROUPED:
            grouped |= run(Scene("plain-grouped", out, groups=2), job)
        assert not [m for m in sys.modules if m.split(".")[0] == "hf_sp"]
        one = {job.__name__: run(Scene("one", out), job) for job in ONE}
    reports = {"plain": plain, "grouped": grouped, "one": one}
    (out / "plain.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
