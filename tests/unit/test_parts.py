"""The parts of a sequence: every token once, real ones in front, in order again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sp.comm.collectives import Axis
from hf_sp.comm.parts import Parts


def _all_ranks(ranks: int, ring: int, multiple: int) -> list[Parts]:
    return [Parts(Axis("", ranks * ring, r), multiple, ring) for r in range(ranks * ring)]


SIZES = {
    "S": st.integers(1, 70),
    "ranks": st.integers(1, 4),
    "ring": st.integers(1, 4),
    "multiple": st.integers(1, 3),
}


@settings(max_examples=300, deadline=None)
@given(**SIZES)
def test_parts_are_the_sequence(S, ranks, ring, multiple):
    """Each token is in one part; padding behind real ones; the order comes back."""
    every = _all_ranks(ranks, ring, multiple)
    x = torch.arange(1, S + 1)[None]
    taken = [parts.take(x, 1) for parts in every]
    P = every[0].length(S)
    assert P % multiple == 0
    for parts, own in zip(every, taken, strict=True):
        real = parts.real(S)
        assert own.shape == (1, P)
        assert own[0].gt(0).tolist() == [True] * real + [False] * (P - real)
    gathered = torch.cat(taken, 1)[0]
    assert every[0].in_order(gathered, S).equal(x[0])
    assert every[0].by_rank(x[0]).equal(gathered)


@settings(max_examples=200, deadline=None)
@given(**SIZES)
def test_places_of_the_ring(S, ranks, ring, multiple):
    """A place's ranks have its stretches, one behind the other; little is padded."""
    every = _all_ranks(ranks, ring, multiple)
    for place in range(ring):
        held = [t for r in range(ranks) for t in _tokens(every[0].held(S, place * ranks + r))]
        assert held == _tokens(every[0].stretches(S, place))
    assert every[0].length(S) * ring * ranks - S < ring * ranks * multiple * 2


def _tokens(stretches: list[tuple[int, int]]) -> list[int]:
    return [t for start, n in stretches for t in range(start, start + n)]


@pytest.mark.parametrize(("ring", "ranks"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2)])
def test_a_causal_masks_work_is_even(ring, ranks):
    """Pairs of query and key of the places, of a length that divides: the same to the pair."""
    parts = Parts(Axis("", ring * ranks, 0), 1, ring)
    S = 16 * ring * ranks
    work = {sum(t + 1 for t in _tokens(parts.stretches(S, place))) for place in range(ring)}
    assert len(work) == 1


def test_one_place_is_the_sequence_in_rank_order():
    parts = _all_ranks(4, 1, 1)
    assert [p.take(torch.arange(8), 0).tolist() for p in parts] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert parts[0].take(torch.arange(8), 0)._is_view()
    two = Parts(Axis("", 2, 0), 1, 2)
    assert two.take(torch.arange(8), 0).tolist() == [0, 1, 6, 7]
    assert replace(two, axis=Axis("", 2, 1)).take(torch.arange(8), 0).tolist() == [2, 3, 4, 5]
