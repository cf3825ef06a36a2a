"""Each recipe runs as its own header says, on CPU, from text that is on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
TRAIN = ["--train_file", "LICENSE", "--max_steps", "2", "--seq_length", "63", "--use_cpu"]
TRAIN += ["--report_to", "none", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_yaml(path):
    """accelerate takes the file, and tp makes up the number of processes."""
    config = ClusterConfig.from_yaml_file(str(path))
    tp = yaml.safe_load(path.read_text())["parallelism_config"]["parallelism_config_tp_size"]
    assert config.num_processes == tp
    assert path.stem.startswith(f"tp{tp}_sp")


def test_accelerate_launch(tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = ["--config_file", "recipes/accelerate/tp2_sp_cpu.yaml"]
    _run([*launch, *config, "recipes/train_trainer.py", *TRAIN, "--output_dir", str(tmp_path)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == model.lm_head.weight.shape[0]


@pytest.mark.parametrize("script", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.name)
def test_recipe_is_short(script):
    assert len(script.read_text().splitlines()) < 120
