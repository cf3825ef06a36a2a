"""The trace of a layer: it runs as far as a CPU goes, and its sums are right."""

from __future__ import annotations

import pytest

from scripts.bench import layer_trace


@pytest.mark.parametrize(
    ("spans", "covered"),
    [([], 0), ([(0, 2), (1, 3)], 3), ([(5, 6), (0, 1)], 2), ([(0, 9), (1, 2), (8, 10)], 10)],
)
def test_time_in_which_something_runs(spans, covered):
    assert layer_trace.union(spans) == covered


def test_each_contender_takes_steps(capsys):
    layer_trace.main(["--quick", "--rounds", "1"])
    printed = capsys.readouterr().out
    assert all(contender.title in printed for contender in layer_trace.CONTENDERS)
    assert printed.count("not measured") == len(layer_trace.CONTENDERS)


def test_figures_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        layer_trace.main([])
    assert "no GPU" in capsys.readouterr().err
