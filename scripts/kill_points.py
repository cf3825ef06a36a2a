"""Kills runs of the stock Trainer at random moments, and resumes them.

    python scripts/kill_points.py --kills 60 [--checkpoint dcp]

Two ranks train and save each step; in every third round the checkpoint that is being saved replaces
one of another model's run. One rank or both are ended with SIGKILL, in every second round inside a
save. Then ``resume_from_checkpoint=True`` must begin at a complete checkpoint and give the losses
of a run that nobody killed. Takes 20 to 30 seconds a kill on two cores; not part of CI.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
CHECKPOINT = "hf"


def rank_main(folder: Path, model: int, resume: bool, checkpoint: str) -> None:
    """One rank: trains, says when it saves, and writes the losses at the end."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from checkpoint import jobs

    torch.set_num_threads(1)
    options = {"checkpoint": checkpoint}
    trainer = jobs.trainer_of(folder / "run", seed=model, max_steps=STEPS, options=options)
    rank = os.environ["RANK"]
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    save = trainer._save_checkpoint

    def marked(*args, **kwargs):
        (folder / f"saving{rank}").touch()
        save(*args, **kwargs)
        (folder / f"saving{rank}").unlink()

    trainer._save_checkpoint = marked
    trainer.train(resume_from_checkpoint=resume)
    if rank == "0":
        (folder / "losses.json").write_text(json.dumps(jobs.history(trainer)))


def start(folder: Path, model: int, resume: bool = False) -> subprocess.Popen:
    """Both ranks; their output goes to a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [__file__, "--folder", str(folder), "--model", str(model)]
    command += [*(["--resume"] if resume else []), "--checkpoint", CHECKPOINT]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with (folder / "output").open("w") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def wait_for(path: Path, process: subprocess.Popen, there: bool = True) -> None:
    while path.exists() != there and process.poll() is None:
        time.sleep(0.0005)


def one_round(number: int, truths: list, folder: Path, rng: random.Random) -> str:
    """Kill once and resume; 'good', or what went wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    saves = rng.randrange(1, STEPS - 1)
    if number % 3 == 0:
        name = f"run/checkpoint-{saves + 1}"
        shutil.copytree(folder.parent / "1" / name, folder / name)
    process = start(folder, model=0)
    for rank in (0, 1):
        wait_for(folder / f"pid{rank}", process)
    victims = [[0], [1], [0, 1]][number // 2 % 3]
    for _ in range(saves):
        wait_for(folder / "saving0", process)
        wait_for(folder / "saving0", process, there=False)
    if number % 2:
        wait_for(folder / f"saving{victims[0]}", process)
        time.sleep(rng.random() * 0.05)
    else:
        time.sleep(rng.random() * 0.2)
    for rank in victims:
        os.kill(int((folder / f"pid{rank}").read_text()), signal.SIGKILL)
    process.wait(timeout=120)
    code = start(folder, model=5, resume=True).wait(timeout=300)
    if code:
        return f"exit {code}: {(folder / 'output').read_text()[-1500:]}"
    found = json.loads((folder / "losses.json").read_text())
    return "good" if found in truths else f"other losses: {found}"


def main() -> int:
    global CHECKPOINT
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--model", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--checkpoint", choices=("hf", "dcp"), default=CHECKPOINT)
    given = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(given.folder, given.model, given.resume, given.checkpoint)
        return 0
    CHECKPOINT = given.checkpoint
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truths, verdicts = [], []
        for model in (0, 1):
            (folder / str(model)).mkdir()
            assert start(folder / str(model), model).wait() == 0
            truths.append(json.loads((folder / str(model) / "losses.json").read_text()))
        for number in range(given.kills):
            verdicts.append(one_round(number, truths, folder / "round", rng))
            print(number, verdicts[-1], flush=True)
    good = verdicts.count("good")
    print(f"{given.kills} kills: {good} good resumes")
    return given.kills - good


if __name__ == "__main__":
    sys.exit(main())
