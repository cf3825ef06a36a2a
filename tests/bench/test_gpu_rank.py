"""One rank on one GPU: it runs as far as a CPU goes, and says what it has not measured."""

from __future__ import annotations

import pytest

from scripts.bench import gpu_rank


def test_each_contender_takes_steps(capsys):
    gpu_rank.main(["--quick", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert printed.count("not measured") == len(gpu_rank.CONTENDERS)
    assert all(title in printed for title in gpu_rank.CONTENDERS)


def test_measured_stands_beside_predicted():
    row = gpu_rank.Row("small", 64, "hf_sp", 2 * 2**20, 3 * 2**20, 1.5)
    assert gpu_rank.cells(row)[3:] == ("2.0", "3.0", "1.500", "1.50")


def test_figures_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_rank.main([])
    assert "no GPU" in capsys.readouterr().err
