"""docs/memory.md and docs/long-context.md show the results, which are what is counted today."""

from __future__ import annotations

import pytest

from scripts.bench import long_context as long
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


def test_the_page_of_long_rows_shows_the_results():
    text, points = long.PAGE.read_text(), long.read()
    assert long.put_table(text, points) == text
    assert [long.key(p) for p in points] == [at for at, _ in long.wanted()]
    assert long.PICTURE.exists()


def test_how_long_rows_can_be():
    """ALST's 3.7 million tokens of Llama-3.1-8B; TRL's 56.2 GB of 1,048,576 of Qwen3-8B."""
    points = {long.key(p): p for p in long.read()}
    short, far = (points["Llama-3.1-8B", 8, "ulysses", "+ both", n] for n in long.lengths(8))
    assert long.fits(short, far) > 3_700_000
    assert points["Qwen3-8B", 8, "ulysses", "+ both", 1048576].peak < 50e9


@pytest.mark.slow
def test_a_long_row_is_counted_again():
    at = ("Llama-3.1-8B", 8, "ulysses", "+ offload", 1048576)
    assert long.count_point(at, dict(long.wanted())[at]) in long.read()
