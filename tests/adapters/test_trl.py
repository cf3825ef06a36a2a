"""TRL's SFTTrainer and DPOTrainer on two ranks against the same script in one process.

The model is in float64; TRL's own fused head computes in float32 (eps 6e-8, of log-probabilities of
about 4) where ours takes the model's dtype. Three or four AdamW steps pass such an error on at most
once each: 1e-5 is ten times the largest that was seen. DPO's rewards and their logits are
differences of summed log-probabilities times beta: they are known to that part of *those* (15
here), 1e-5 * 0.2 * 15 absolutely.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORKER = Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[2]
TOLERANCE = 1e-5
SFT = [
    "lora",
    "lora_resumed",
    "full",
    "tied",
    "packed",
    "padding_free",
    "completions",
    "dft",
    "saved_modules",
    "before",
]
DPO = ["dpo_lora", "dpo_full"]


def start(mode, out, ranks=None):
    launcher = [sys.executable]
    if ranks is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(out / f"cache-{mode}"),
    }
    done = subprocess.run(
        [*launcher, str(WORKER), mode, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"worker {mode} failed\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return [json.loads((out / f"{mode}-{r}.json").read_text()) for r in range(ranks or 1)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    out = tmp_path_factory.mktemp("trl")
    return {
        "out": out,
        "plain": start("plain", out),
        "tp": start("tp", out, ranks=2),
        "back": start("back", out),
    }


def differences(a, b, path=""):
    if isinstance(a, dict):
        return [d for k in sorted({*a, *b}) for d in differences(a.get(k), b.get(k), f"{path}/{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, float) and isinstance(b, float):
        close = abs(a - b) <= TOLERANCE * max(abs(a), abs(b))
        if "dpo" in path and ("rewards" in path or "logits" in path):
            close = close or abs(a - b) < TOLERANCE * 0.2 * 15
        return [] if close else [f"{path}: {a} {b}"]
    return [] if a == b else [f"{path}: {a} {b}"]


@pytest.mark.parametrize("name", [*SFT, *DPO])
def test_training_is_that_of_one_process(name, reports):
    """Loss, grad_norm, entropy, token accuracy, token count of every step; the trained weights."""
    plain, tp = reports["plain"][0][name], reports["tp"][0][name]
    assert len(plain["history"]) > 1
    assert all("grad_norm" in step for step in plain["history"])
    assert differences(plain, tp, name) == []


@pytest.mark.parametrize("name", [*SFT, *DPO])
def test_ranks_agree(name, reports):
    first, second = (r[name] for r in reports["tp"])
    assert first == second
    assert first["replicas"]


def test_clipping_was_active(reports):
    steps = reports["plain"][0]["lora"]["history"]
    assert all(step["grad_norm"] > 0.5 for step in steps)


def test_resumed_run_is_the_uninterrupted_one(reports):
    for report in [*reports["plain"], *reports["tp"]]:
        # TRL counts tokens anew after a resume.
        histories = [
            [{k: v for k, v in step.items() if k != "num_tokens"} for step in report[n]["history"]]
            for n in ("lora", "lora_resumed")
        ]
        assert histories[0] == histories[1]
        assert report["lora"]["weights"] == report["lora_resumed"]["weights"]


@pytest.mark.parametrize(("mode", "source"), [("tp", "plain"), ("back", "tp"), ("back", "plain")])
def test_resume_from_another_degree(mode, source, reports):
    """Adapter and optimizer, of stock Trainer on one process or of two ranks."""
    want = reports["plain"][0]["lora"]
    for report in reports[mode]:
        found = report[f"cross_{source}"]
        for steps in (want["history"], found["history"]):
            for step in steps:
                step.pop("num_tokens", None)
        assert differences(want["history"], found["history"]) == []
        assert differences(want["weights"], found["weights"]) == []


def test_the_head_is_not_gathered(reports):
    """Two checkpoints of the adapter's 28 tensors, and the comparison at the end."""
    for report in reports["tp"]:
        assert report["gathers"] == 3 * 28


def test_saved_adapter_is_that_of_one_process(reports):
    plain, tp = (reports["out"] / mode / "lora" for mode in ("plain", "tp"))
    mine = load_file(tp / "adapter_model.safetensors")
    theirs = load_file(plain / "adapter_model.safetensors")
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert mine[name].shape == tensor.shape
        assert mine[name].dtype == tensor.dtype
        assert (mine[name] - tensor).abs().max() <= TOLERANCE * tensor.abs().max()
    configs = [json.loads((p / "adapter_config.json").read_text()) for p in (plain, tp)]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("case", "words"),
    [("activation_offloading", "activation_offloading=False"), ("other", "SFTTrainer, DPOTrainer")],
)
def test_refused_on_every_rank_alike(case, words, reports):
    first, second = (r["refusals"][case] for r in reports["tp"])
    assert first == second
    assert first["type"] == "ConfigError"
    assert words in first["message"]
