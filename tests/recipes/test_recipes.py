"""Each recipe runs as its own header says, on CPU, from text that is on any machine."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from peft import PeftModel
from torch.distributed.run import get_args_parser
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, SFTConfig

pytestmark = [pytest.mark.recipe, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
TRAIN = ["--train_file", "LICENSE", "--max_steps", "2", "--seq_length", "63", "--use_cpu"]
TRAIN += ["--report_to", "none", "--per_device_train_batch_size", "2", "--disable_tqdm", "true"]


def _run(command: list[str], times: int = 1) -> str:
    """What it prints; ``times`` processes of it at once, as on that many nodes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for _ in range(times)]
    try:
        printed = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0] * times, "\n".join(printed)
    return "".join(printed)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_yaml(path):
    """accelerate takes the file, and tp makes up the number of processes."""
    config = ClusterConfig.from_yaml_file(str(path))
    if config.num_machines > 1:
        assert path.stem == f"nodes{config.num_machines}_tp{config.num_processes // 2}"
        return
    sizes = yaml.safe_load(path.read_text())["parallelism_config"]
    tp, dp = (sizes[f"parallelism_config_{name}_size"] for name in ("tp", "dp_shard"))
    assert config.num_processes == tp * dp
    assert path.stem.startswith(f"tp{tp}_sp" if dp == 1 else f"tp{tp}_dp{dp}_sp")


@pytest.mark.parametrize(("name", "groups"), [("tp2_sp_cpu", 1), ("tp2_dp2_sp", 2)])
def test_accelerate_launch(name, groups, tmp_path):
    """The degrees are the YAML's."""
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    config = (ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text()
    for gpu, cpu in {"use_cpu: false": "use_cpu: true", "'bf16'": "'no'"}.items():
        config = config.replace(gpu, cpu)
    path = tmp_path / "accelerate.yaml"
    path.write_text(config + ("" if "process_port" in config else "main_process_port: 0\n"))
    out = ["--output_dir", str(tmp_path / "out"), "--save_steps", "2"]
    _run([*launch, "--config_file", str(path), "recipes/train_trainer.py", *TRAIN, *out])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == model.lm_head.weight.shape[0]
    manifest = json.loads((tmp_path / "out" / "checkpoint-2" / "hf_sp_manifest.json").read_text())
    assert (manifest["tp"], manifest["dp"]) == (2, groups)


LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
LAUNCH += ["--config_file", "recipes/accelerate/tp2_sp_cpu.yaml"]
SFT = ["--max_steps", "2", "--max_length", "33", "--use_cpu", "--bf16", "False", "--dtype"]
SFT += ["float32", "--report_to", "none", "--per_device_train_batch_size", "2"]
SFT += ["--logging_steps", "1", "--gradient_accumulation_steps", "1"]


@pytest.mark.parametrize(
    ("config", "script", "data"),
    [("sft_full", "sft_trainer", "rows"), ("sft_lora", "sft_lora", "pairs")],
)
def test_sft(config, script, data, local, tmp_path):
    """The YAML as it stands, but for the model, the data and the size."""
    own = ["--model_name_or_path", str(local / "model")]
    own += ["--dataset_name", str(local / f"{data}.jsonl"), "--output_dir", str(tmp_path)]
    if data == "pairs":
        # The other way of batching.
        own += ["--packing", "False"]
    yaml_file = ["--config", f"recipes/configs/{config}.yaml"]
    printed = _run([*LAUNCH, f"recipes/{script}.py", *yaml_file, *SFT, *own])
    assert "mean_token_accuracy" in printed
    base = AutoModelForCausalLM.from_pretrained(local / "model")
    if config == "sft_full":
        trained = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        trained = PeftModel.from_pretrained(base, tmp_path)
        assert {"adapter_model.safetensors", "adapter_config.json"} <= {
            p.name for p in tmp_path.iterdir()
        }
        moved = [p for n, p in trained.named_parameters() if "lora_B" in n]
        assert len(moved) == 14
        assert all(p.any() for p in moved)
    assert trained.config.vocab_size == base.config.vocab_size


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")))
def test_config_keys_are_trls(path):
    known = {f.name for kind in (SFTConfig, ScriptArguments, ModelConfig) for f in fields(kind)}
    assert yaml.safe_load(path.read_text()).keys() <= known


def test_accelerate_loop(local, tmp_path):
    own = ["--model_name_or_path", str(local / "model"), "--train_file", "LICENSE"]
    own += ["--output_dir", str(tmp_path), "--seq_length", "33", "--max_steps", "2", "--cpu"]
    printed = _run([*LAUNCH, "recipes/accelerate_loop.py", *own, "--lora_r", "4"])
    assert printed.count("grad norm") == 2
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_torchrun_loop(local, tmp_path):
    """Two nodes of two ranks, a group each, print what one process does with all their batches.

    The nodes are two launchers that meet at a port of this machine. float32 sums in another order:
    1e-5; five and four places are printed.
    """
    own = ["--model_name_or_path", str(local / "model"), "--train_file", "LICENSE"]
    own += ["--seq_length", "33", "--max_steps", "3", "--learning_rate", "1e-2"]
    one = ["--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")]
    four = ["--tp", "2", "--dp_shard", "2", "--output_dir", str(tmp_path / "four")]
    script = "recipes/torchrun_loop.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    torchrun += ["--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_id", "nodes"]
    torchrun += ["--rdzv_endpoint", f"127.0.0.1:{_free_port()}", script, *own, *four]
    printed = [_run([sys.executable, script, *own, *one]), _run(torchrun, times=2)]
    found = []
    for text in printed:
        lines = [x for x in text.splitlines() if "grad norm" in x]
        assert len(lines) == 3
        found.append([(float(x.split()[3]), float(x.split()[6])) for x in lines])
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=2e-4)
    single, grouped = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "four")
    )
    for (name, p), q in zip(single.named_parameters(), grouped.parameters(), strict=True):
        # AdamW's first steps are of the learning rate's size whatever the gradient's: where that
        # is rounding noise, the sign of a step may be another.
        assert ((p - q).abs() > 1e-3).float().mean() < 0.01, name


def test_slurm():
    """The shell takes it, and torchrun the options that it is given."""
    path = ROOT / "recipes" / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(path)], check=True)
    call = re.search(r"\nsrun [^\n]* torchrun (.*)", path.read_text(), re.DOTALL)[1].replace(
        "\\\n", " "
    )
    words = [x.strip('"') for x in call.split()]
    given = get_args_parser().parse_args(
        [*(x.replace("$SLURM_NNODES", "4").replace("${SLURM_GPUS_ON_NODE:-8}", "8") for x in words)]
    )
    assert (given.nnodes, given.nproc_per_node, given.rdzv_backend) == ("4", "8", "c10d")


@pytest.mark.parametrize("script", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.name)
def test_recipe_is_short(script):
    assert len(script.read_text().splitlines()) < 120
