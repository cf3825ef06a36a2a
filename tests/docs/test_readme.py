"""What the README shows is what happens: each block of code is taken from it and run."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import sizes
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sp import parallelize
from hf_sp.errors import PlanError
from hf_sp.plan import derive_plan
from hf_sp.versions import TESTED

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()

# The names that the README's script takes for granted.
BEFORE = """
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
name, out = sys.argv[1:3]
args = TrainingArguments(out, max_steps=3, use_cpu=True, report_to="none", save_strategy="no",
                         logging_steps=1, per_device_train_batch_size=2, disable_tqdm=True)
ids = torch.arange(8 * 17).reshape(8, 17) * 7 % 61
data = [{"input_ids": row, "labels": row} for row in ids]
"""
AFTER = """
rows = [r for r in trainer.state.log_history if "grad_norm" in r]
if trainer.is_world_process_zero():
    print("RESULT", json.dumps([[r["loss"], r["grad_norm"]] for r in rows]))
"""


def _block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return found


def _run(script: Path, ranks: int, *args: str) -> list[list[float]]:
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*command, str(script), *args],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**__import__("os").environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [one for one in done.stdout.splitlines() if one.startswith("RESULT")]
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.slow
def test_the_two_line_diff(tmp_path):
    """Without the added lines on one process, with them on two: same losses and gradient norms.

    float32 sums in another order: 1.2e-7 * sqrt(64) a step, times a few operations: 1e-5.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**sizes(hidden_size=64, intermediate_size=96))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    lines = _block("diff", "parallelize").splitlines()
    scripts = {
        1: [line[1:] for line in lines if not line.startswith("+")],
        2: [line[1:] for line in lines],
    }
    results = {}
    for ranks, code in scripts.items():
        path = tmp_path / f"on_{ranks}.py"
        path.write_text(BEFORE + "\n".join(code) + AFTER)
        results[ranks] = _run(path, ranks, str(tmp_path / "model"), str(tmp_path / f"out{ranks}"))
    assert len(lines) - len(scripts[1]) == 2
    assert len(results[1]) == 3
    for one, two in zip(results[1], results[2], strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_signature():
    """Every parameter, in order, with its default."""
    shown = re.search(r"\((.*)\)", _block("python", "loss_chunk").strip())[1].split(", ")
    want = [
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(parallelize).parameters.items()
    ]
    assert [part for part in shown if part != "*"] == want


def test_refusal():
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=1,
                hidden_size=4096,
                intermediate_size=14400,
                num_attention_heads=32,
                num_key_value_heads=8,
            )
        )
    with pytest.raises(PlanError) as error:
        derive_plan(model, 3, True)
    assert _block("text", "PlanError").strip() == f"PlanError: {error.value}"


def test_numbers_are_the_committed_ones():
    table = (ROOT / "scripts/bench/results/step_cost.md").read_text()
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    alive = {(r[0], r[3]): float(r[4]) for r in rows if len(r) > 10 and r[1] == "8"}
    shown = {
        "one GPU": "unsharded",
        "transformers' own TP": "HF native TP",
        "torch DTensor": "DTensor TP+SP",
        "hf_sp, `recompute": "hf_sp sp=True recompute=none",
        "**hf_sp**": "hf_sp sp=True",
    }
    for start, layout in shown.items():
        (line,) = [x for x in README.splitlines() if x.startswith(f"| {start}")]
        numbers = [float(x) for x in re.findall(r"(\d+) MiB", line)]
        want = [alive[(shape, layout)] for shape in ("Llama-3.1-8B", "Llama-3.1-70B")]
        assert numbers == [round(x) for x in want]


def test_installs_the_newest_tested_versions():
    """As tests/unit/test_versions.py has it of that file."""
    commands = _block("bash", "pip install").splitlines()
    assert all(line.startswith("pip install -c constraints.txt -e ") for line in commands)


def test_tested_versions_are_those_that_do_not_warn():
    prose = " ".join(README.split())
    rows = re.findall(r"^\| (5\.[\d.]+) \| ([\d.]+) \| ([\d.]+) \|", README, re.MULTILINE)
    for package, (oldest, newest) in TESTED.items():
        assert f"{package} {oldest}" + (f" to {newest}," if newest != oldest else ",") in prose
    columns = zip(*rows, strict=True)
    for package, column in zip(("transformers", "torch", "accelerate"), columns, strict=True):
        assert {".".join(v.split(".")[:2]) for v in column} >= set(TESTED[package])


@pytest.mark.parametrize("document", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")))
def test_links_and_paths_exist(document):
    text = document.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    paths = re.findall(r"`((?:scripts|tests|docs|recipes|hf_sp)/[\w./-]+)`", text)
    for path in [*links, *paths]:
        assert (ROOT / path).exists() or (document.parent / path).exists(), path
