"""The kernel benchmark, as far as it goes without a GPU: what it runs, judges and writes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_sp.kernels import cross_entropy_steps, reference
from hf_sp.kernels import launch as dispatch
from scripts.bench import kernels as script
from scripts.bench._kernels import cases, clock, contenders, oracle, report, runner, sweep
from scripts.bench._kernels.contenders import COPY, DIRECT, OURS, Contender, Step
from tests.kernels import interpreter

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts/bench/results"
OTHERS = {"HF eager", "F.rms_norm", "torch.compile", "Liger", "quack", COPY}
LOSSES = {OURS, "Liger vocab-parallel"} | OTHERS - {"F.rms_norm"}
# As a user runs it; and with the interpreter that tests mend.
SCRIPT = ("scripts/bench/kernels.py",)
MENDED = (
    "-c",
    "from hf_sp.kernels import launch; from tests.kernels import interpreter;"
    "launch.interpreter = interpreter.launch;"
    "from scripts.bench import kernels; raise SystemExit(kernels.main())",
)
WHO = {
    "norm": {OURS, DIRECT} | OTHERS,
    "swiglu": {OURS, DIRECT} | OTHERS - {"F.rms_norm", "quack"},
}


@pytest.fixture(autouse=True)
def _compiled_kernels(monkeypatch):
    """The torch counterparts, whatever the rest of the session was told."""
    monkeypatch.setattr(dispatch, "interpreter", None)


def _state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _environ(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return kept | {"OMP_NUM_THREADS": "1"} | more


# --- as a user runs it --------------------------------------------------------------------------


@pytest.mark.recipe
@pytest.mark.slow
@pytest.mark.parametrize("interpret", [False, True], ids=["torch", "interpreter"])
def test_dry_run_runs_and_judges_everything(tmp_path, interpret):
    before = _state(RESULTS)
    script = MENDED if interpret else SCRIPT
    done = subprocess.run(
        [sys.executable, *script, "--dry-run", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=ROOT,
        env=_environ(**({"TRITON_INTERPRET": "1"} if interpret else {})),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert _state(RESULTS) == before
    rows = _read(tmp_path / "kernels.csv")
    seen: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        seen.setdefault((row["group"], row["op"], row["step"]), set()).add(row["contender"])
    expected = {
        (case.group, case.op, step): WHO[case.op]
        for case in cases.tiny_cases()
        if case.op != "ce"
        for step in cases.FLOORS[case.op]
    }
    expected["ce", "ce", "forward+backward"] = LOSSES
    expected["ce", "ce", "statistics"] = expected["ce", "ce", "gradient"] = {DIRECT, COPY}
    assert seen == expected
    for row in rows:
        ours = row["contender"].startswith("ours")
        if row["contender"] in ("Liger", "Liger vocab-parallel", "quack"):
            assert row["status"] in ("not installed", "not run: needs a GPU")
            continue
        assert row["status"] == "ok", row
        assert row["path"] == ("" if not ours else "triton" if interpret else "torch")
        if row["contender"] != COPY:
            assert row["correct"] == "yes"
            assert 0 < float(row["error"]) <= float(row["bound"])
        assert row["median_us"] == row["gb_s"] == row["of_copy"] == row["first_call_s"] == ""
        assert row["met"] == ("not measured" if row["contender"] == OURS else "")
        assert row["gpu"] == "none (dry run)"
        assert row["torch"] == torch.__version__
    page = (tmp_path / "kernels.md").read_text()
    assert "python scripts/bench/kernels.py --dry-run" in page
    assert all(f"## {group}\n" in page for group in cases.GROUPS)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_a_dry_run_never_writes_results(capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--dry-run", "--out", str(RESULTS)])
    assert stop.value.code == 2
    assert "give --out another" in capsys.readouterr().err


def test_unknown_group_is_refused(capsys):
    assert script.main(["--dry-run", "--only", "norm,rope"]) == 2
    assert "no group rope; legal: norm, sp, ce, qnorm, swiglu" in capsys.readouterr().out


def test_found_as_another_package_it_imports_nothing():
    """Scripts beside it have their folder on the path, where transformers looks for `kernels`."""
    code = "import sys; sys.path.insert(0, 'scripts/bench'); import kernels; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not {"torch", "transformers", "scripts", "hf_sp"} & set(done.stdout.split())


def test_sweep_without_kernels_says_so(tmp_path, capsys):
    assert script.main(["--dry-run", "--sweep", "--out", str(tmp_path)]) == 0
    rows = _read(tmp_path / "kernels_sweep.csv")
    assert {row["status"] for row in rows} == {
        "not run: the kernels need a GPU or TRITON_INTERPRET=1"
    }


def test_sweep_runs_the_kernels_with_its_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "interpreter", interpreter.launch)
    assert script.main(["--dry-run", "--sweep", "--out", str(tmp_path)]) == 0
    rows = _read(tmp_path / "kernels_sweep.csv")
    assert {(row["status"], row["path"], row["correct"]) for row in rows} == {
        ("ok", "triton", "yes")
    }
    for case in sweep.tiny_cases():
        for step in sweep.steps(case):
            found = [r for r in rows if (r["group"], r["step"]) == (case.group, step)]
            assert found[0]["contender"] == sweep.TABLE
            assert len(found) == 3


# --- what is wrong is called wrong --------------------------------------------------------------


def _swap(module, name, change):
    """A fault: the function's result, or arguments, changed."""
    honest = getattr(module, name)
    return module, name, lambda *args, **kwargs: change(honest, *args, **kwargs)


def _changed(index, function):
    def change(honest, *args, **kwargs):
        results = list(honest(*args, **kwargs))
        results[index] = function(results[index])
        return tuple(results)

    return change


def _last_row(value):
    def fill(x):
        x = x.clone()
        x[-1] = value
        return x

    return fill


def _no_mean(honest, dy, x, rstd, weight, *rest):
    _, dw = honest(dy, x, rstd, weight, *rest)
    return (dy * weight * rstd[:, None]).to(x.dtype), dw


def _rows_lost(honest, dy, *rest, **kwargs):
    dx, _ = honest(dy, *rest, **kwargs)
    return dx, honest(dy * (torch.arange(len(dy)) < len(dy) - 1)[:, None], *rest, **kwargs)[1]


def _no_weight(honest, x, weight, *rest):
    return honest(x, torch.ones_like(weight), *rest)


def _unscaled(honest, gate, up, *rest):
    return honest(gate, torch.ones_like(up), *rest)


def _wrong_slope(honest, dz, gate, up, *rest):
    _, dup, z = honest(dz, gate, up, *rest)
    return (dz * up * torch.sigmoid(gate)).to(gate.dtype), dup, z


def _next_label(honest, x, labels, *rest):
    return honest(x, (labels + 1).clamp(max=x.shape[1] - 1), *rest)


def _all_count(honest, x, labels, *rest):
    return honest(x, labels.clamp(min=0), *rest)


def _half(honest, *args):
    return honest(*args) / 2


FAULTS = {
    "norm: no weight": ("norm", "y", _swap(reference, "rms_norm", _no_weight)),
    "norm: a row not written": (
        "norm",
        "y",
        _swap(reference, "rms_norm", _changed(0, _last_row(float("nan")))),
    ),
    "norm: a row of zeros": ("norm", "y", _swap(reference, "rms_norm", _changed(0, _last_row(0)))),
    "norm: 2 % off": ("norm", "y", _swap(reference, "rms_norm", _changed(0, lambda y: y * 1.02))),
    "norm: dx without the mean": ("norm", "dx", _swap(reference, "rms_norm_backward", _no_mean)),
    "norm: dw lacks a row": ("norm", "dw", _swap(reference, "rms_norm_backward", _rows_lost)),
    "swiglu: no up": ("swiglu", "z", _swap(reference, "swiglu", _unscaled)),
    "swiglu: wrong slope": ("swiglu", "dgate", _swap(reference, "swiglu_backward", _wrong_slope)),
    "ce: labels one off": (
        "ce",
        "dlogits",
        _swap(cross_entropy_steps, "_slab_gradient", _next_label),
    ),
    "ce: gradient of half": ("ce", "dlogits", _swap(cross_entropy_steps, "_slab_gradient", _half)),
    "ce: loss of other labels": (
        "ce",
        "loss",
        _swap(cross_entropy_steps, "_slab_statistics", _next_label),
    ),
    "ce: ignored tokens count": (
        "ce",
        "dlogits",
        _swap(cross_entropy_steps, "_slab_gradient", _all_count),
    ),
}


def _case(op: str) -> cases.Case:
    return next(case for case in cases.tiny_cases() if case.op == op and not case.graph)


def _run(op: str, *names: str) -> list[runner.Row]:
    chosen = [one for one in contenders.contenders(op) if one.name in names]
    return runner.run_case(_case(op), chosen, clock.NoClock(), runner.Budget(60))


@pytest.mark.parametrize("op", ["norm", "swiglu", "ce"])
def test_right_kernels_are_right(op):
    rows = _run(op, OURS, DIRECT, "HF eager")
    assert {(row.status, row.correct) for row in rows} == {("ok", "yes")}
    assert runner.wrong(rows) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_is_called_wrong(fault, monkeypatch):
    op, name, change = FAULTS[fault]
    monkeypatch.setattr(*change)
    rows = _run(op, OURS)
    bad = [row for row in rows if row.correct == "NO"]
    assert name in {row.worst for row in bad}, rows
    assert all(row.status == f"wrong: {row.worst}" for row in bad)
    assert runner.wrong(rows) == bad


def test_a_wrong_kernel_fails_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(*FAULTS["swiglu: no up"][2])
    assert script.main(["--dry-run", "--only", "swiglu", "--out", str(tmp_path)]) == 1
    rows = {(row["step"], row["contender"]): row for row in _read(tmp_path / "kernels.csv")}
    assert rows["forward", OURS]["correct"] == "NO"
    assert rows["forward", "HF eager"]["correct"] == "yes"
    assert "not right: swiglu forward" in capsys.readouterr().out


def test_falling_back_to_torch_is_a_failure(monkeypatch):
    """Where the kernels can run, an answer from torch is right, and slow."""
    monkeypatch.setattr(dispatch, "interpreter", interpreter.launch)
    monkeypatch.setattr(dispatch, "usable", lambda *tensors: False)
    rows = _run("norm", OURS)
    assert {row.status for row in rows} == {"failed: ran in torch, not in Triton"}
    assert runner.wrong(rows) == rows


def test_float64_is_beyond_doubt():
    """The reference against autograd in float64, which shares nothing with its formulas."""
    for op in ("norm", "swiglu"):
        data = cases.make_data(_case(op), torch.device("cpu"))
        wide = [x.detach().double().requires_grad_() for x in data.inputs]
        if op == "swiglu":
            results = (torch.nn.functional.silu(wide[0]) * wide[1],)
        else:
            x, w = wide
            results = (x * (x.pow(2).mean(-1, keepdim=True) + cases.EPS).rsqrt() * w,)
        grads = torch.autograd.grad(results, wide, [g.double() for g in data.grads])
        for step, found in (("forward", results), ("backward", grads)):
            with torch.no_grad():
                assert oracle.check(data, step, found)[1] < 1e-12
    data = cases.make_data(_case("ce"), torch.device("cpu"))
    wide = data.inputs[0].detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(wide, data.labels, reduction="sum")
    (grad,) = torch.autograd.grad(loss, wide)
    with torch.no_grad():
        assert oracle.check(data, "forward+backward", (loss, grad))[1] < 1e-12


def test_whatever_a_contender_raises_is_its_row():
    def refuse(data):
        raise ImportError("no [such] symbol\nand more")

    def crash():
        raise ZeroDivisionError

    everyone = [
        Contender("refuses", refuse),
        Contender("crashes", lambda data: {"forward": Step(crash), "backward": Step(crash)}),
        Contender("absent", refuse, package="hf_sp_no_such_package"),
    ]
    rows = runner.run_case(_case("norm"), everyone, clock.NoClock(), runner.Budget(60))
    assert [(row.step, row.status) for row in rows] == [
        (step, status)
        for step in ("forward", "backward")
        for status in (
            "failed: ImportError: no [such] symbol",
            "failed: ZeroDivisionError: no message",
            "not installed",
        )
    ]
    report.table(rows, "shown as they are")
