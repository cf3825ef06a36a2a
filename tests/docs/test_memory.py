"""docs/memory.md shows what is in the results, and the results are what is counted today."""

from __future__ import annotations

import pytest

from scripts.bench import memory_figures as figures


def test_the_page_shows_the_results():
    text, points = figures.PAGE.read_text(), figures.read()
    assert figures.put_tables(text, points) == text
    assert [(p.model, p.tp, p.way, p.seq) for p in points] == [p[:4] for p in figures.wanted()]
    assert all((figures.PAGE.parent / f"memory_{m.lower()}.png").exists() for m in figures.MODELS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tp", "way", "seq"), [("8B", 8, "SP + recompute (default)", 8192)]
)
def test_a_point_is_counted_again(model, tp, way, seq):
    run = next(p for p in figures.wanted() if p[:4] == (model, tp, way, seq))
    assert figures.count_point(*run) in figures.read()
