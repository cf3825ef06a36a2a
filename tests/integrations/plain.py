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

from integrations import jobs  # noqa: E402
from integrations.scene import Scene, freeze_imports, launched  # noqa: E402

ONE = ("resume", "save", "dropout_resume", "cross")


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
        assert not [m for m in sys.modules if m.split(".")[0] == "hf_sp"]
        one = {name: run(Scene("one", out), jobs.JOBS[name]) for name in ONE}
    (out / "plain.json").write_text(json.dumps({"plain": plain, "one": one}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
