"""What is read of transformers' masks is what they say; and a ring computes each pair once."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from harness import batches
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionMaskInterface, masking_utils

from hf_sp.comm.collectives import Axis
from hf_sp.comm.parts import Parts
from hf_sp.context import ring
from hf_sp.context.masks import Band, Evaluated, Given, Intervals, Mask, describe

S = 13
AttentionMaskInterface.register("described", describe)
make = masking_utils
_packed = batches.packed((4, 1, 5, 3), batch=2)["position_ids"]
_odd = torch.cat([_packed[:1], torch.arange(S)[None]])


def _real(*rows: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in row] for row in rows])


_LEFT, _RIGHT = _real("..xxxxxxxxxxx", "xxxxxxxxxxxxx"), _real("xxxx.........", "xxxxxxxxxxxx.")
# What makes the mask, its arguments, and as what it is known.
MADE = {
    "causal": (make.create_causal_mask, {}, Band),
    "sliding": (make.create_sliding_window_causal_mask, {}, Band),
    "full": (make.create_bidirectional_mask, {}, Band),
    "sliding both ways": (make.create_bidirectional_sliding_window_mask, {}, Band),
    "chunked": (make.create_chunked_causal_mask, {}, Evaluated),
    "not padded": (make.create_causal_mask, {"attention_mask": _real("x" * S, "x" * S)}, Band),
    "left": (make.create_causal_mask, {"attention_mask": _LEFT}, Intervals),
    "right, sliding": (
        make.create_sliding_window_causal_mask,
        {"attention_mask": _RIGHT},
        Intervals,
    ),
    "nothing real": (
        make.create_causal_mask,
        {"attention_mask": _real("." * S, "x" * S)},
        Intervals,
    ),
    "holes": (
        make.create_causal_mask,
        {"attention_mask": _real("xxx..xxxxxxxx", "x" * S)},
        Evaluated,
    ),
    "documents": (make.create_causal_mask, {"position_ids": _packed}, Intervals),
    "documents of one row": (make.create_causal_mask, {"position_ids": _odd}, Intervals),
    "documents, sliding": (
        make.create_sliding_window_causal_mask,
        {"position_ids": _packed},
        Intervals,
    ),
    "documents, chunked": (make.create_chunked_causal_mask, {"position_ids": _packed}, Evaluated),
    "a function of the user's": (
        make.create_causal_mask,
        {"or_mask_function": lambda b, h, q, k: (q < 3) & (k < 3)},
        Evaluated,
    ),
}


def _masks(name: str) -> tuple[Mask, torch.Tensor, type]:
    """Ours, transformers' own ``[B, 1, S, S]``, and as what it should be known."""
    function, given, kind = MADE[name]
    found = []
    for implementation in ("described", "sdpa"):
        config = SimpleNamespace(
            _attn_implementation=implementation,
            sliding_window=4,
            attention_chunk_size=4,
            is_causal=True,
        )
        how = {"config": config, "inputs_embeds": torch.zeros(2, S, 4), "attention_mask": None}
        how |= given
        # Its names until transformers 5.23, and since.
        names = inspect.signature(function).parameters
        how |= {n: None for n in ("cache", "past_key_values") if n in names}
        found.append(function(**how))
    mine, theirs = found
    if theirs is None:
        causal = torch.ones(S, S, dtype=torch.bool)
        theirs = (causal if name == "full" else causal.tril()).expand(2, 1, S, S)
    return mine, theirs, kind


@pytest.mark.parametrize("name", MADE)
def test_a_description_is_the_mask(name):
    mine, theirs, kind = _masks(name)
    assert type(mine) is kind
    device = torch.device("cpu")
    assert mine.allowed(0, S, 0, S, device).expand(2, 1, S, S).equal(theirs)
    for query in range(S):
        for n in range(1, S - query + 1):
            rows = theirs[:, 0, query : query + n]
            assert (
                mine.allowed(query, n, 2, 7, device).expand(2, 1, n, 7)[:, 0].equal(rows[..., 2:9])
            )
            seen = mine.seen(query, n)
            if seen is None:
                continue
            some, every = rows.any(1).any(0), rows.all(1).all(0)
            assert some.nonzero().flatten().tolist() == [*range(seen.first, seen.last + 1)]
            inner = [*range(seen.inner_first, seen.inner_last + 1)]
            assert every.nonzero().flatten().tolist() == inner
            own = torch.arange(query, query + n)
            last = S - 1 - rows.flip(-1).int().argmax(-1)
            diagonal = bool(rows.any(-1).all() and last.eq(own).all())
            # Of the last token all masks are that.
            assert seen.diagonal == diagonal or (diagonal and query + n == S)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*MADE, "given"]),
    size=st.integers(2, 4),
    ranks=st.integers(1, 2),
    rows=st.integers(1, 5),
)
def test_a_ring_attends_to_each_pair_once(name, size, ranks, rows):
    """Of every rank: what it is sent, what that is, and which pairs its tiles have."""
    mask, theirs, _ = _masks("causal" if name == "given" else name)
    if name == "given":
        mask = Given(theirs)
    with mock.patch.object(ring, "TILE_ROWS", rows):
        every = {
            place: {hop.number: hop for hop in ring.hops_of(mask, S, _parts(size, ranks, place))}
            for place in range(size)
        }
    assert len({tuple(sorted(hops)) for hops in every.values()}) == 1
    for place, hops in every.items():
        own = _tokens(place, size, ranks)
        times = torch.zeros(2, S, S, dtype=torch.int)
        for h, hop in hops.items():
            source = (place - h) % size
            there = own
            if h:
                sender = every[source][h]
                there = [t for a, n in sender.sent for t in _tokens(source, size, ranks)[a : a + n]]
                assert hop.receive[source] == sender.send[place] == len(there)
                assert sum(hop.receive) == len(there)
            for tile in hop.tiles:
                q = own[tile.query : tile.query + tile.n]
                k = there[tile.key : tile.key + tile.m]
                assert len(q) == tile.n > 0
                assert len(k) == tile.m > 0
                got = torch.ones(tile.n, tile.m, dtype=torch.bool).expand(2, -1, -1)
                got = got.tril() if tile.causal else got
                if tile.masked is not None:
                    assert (q[0], k[0]) == tile.masked
                    added = mask.tile(tile.masked[0], tile.n, tile.masked[1], tile.m, torch.ones(1))
                    got = added.isfinite()[:, 0].expand(2, -1, -1)
                times[:, q[0] : q[-1] + 1, k[0] : k[-1] + 1] += got.int()
        want = theirs[:, 0].int().clone()
        want[:, [t for t in range(S) if t not in own]] = 0
        assert times.equal(want)


def _parts(size: int, ranks: int, place: int) -> Parts:
    return Parts(Axis("", size * ranks, place * ranks), 1, size, None, Axis("", size, place))


def _tokens(place: int, size: int, ranks: int) -> list[int]:
    found = _parts(size, ranks, place).stretches(S, place)
    return [t for start, n in found for t in range(start, start + n)]
