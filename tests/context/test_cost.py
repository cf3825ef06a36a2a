"""What context parallelism sends, keeps and computes, counted: to the byte, to the pair."""

from __future__ import annotations

import functools

import pytest
import torch
from parity.test_cost import GROUPED, _config
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from hf_sp import parallelize
from hf_sp.comm.collectives import Axis
from hf_sp.comm.parts import Parts
from hf_sp.context import ring
from hf_sp.context.masks import Band, Intervals
from hf_sp.estimate import CollectiveCount, count_step, fake_tensors, fake_world, per_layer
from hf_sp.model.fsdp import make_buffers
from scripts.bench._cost.layers import kernels_bytes_per_token

pytestmark = pytest.mark.slow

LENGTH, BATCH, BF16 = 512, 2, 2
heads, kv, D = GROUPED.heads, GROUPED.kv_heads, GROUPED.head_dim


@functools.cache
def _step(tp: int, cp: int, layers: int, rank: int = 0, window: int = 0, **how):
    with fake_world(tp * cp, rank), fake_tensors():
        config = _config(MistralConfig if window else LlamaConfig, GROUPED, layers, 128)
        if window:
            config.sliding_window = window
        model = AutoModelForCausalLM.from_config(config)
        model = parallelize(model.train(), tp=tp, cp=cp, **how)
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        make_buffers(model)  # as after a first step
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def _layer(tp: int, cp: int, *of, **how):
    return per_layer(*(_step(tp, cp, layers, *of, **how) for layers in (2, 3)))


@pytest.mark.parametrize(("tp", "cp"), [(1, 8), (2, 4)])
def test_bytes_of_a_layer(tp, cp):
    """The exchange: a token's q, k, v and output of a tp rank's heads, k and v as often as read.

    Kept: what tp keeps of that part; k and v of the whole sequence for heads that several ranks
    have, and where they go; and the output twice, by heads for the attention's backward, by tokens
    for the row linear's weight.
    """
    copies, tokens = max(1, cp * tp // kv), BATCH * LENGTH // cp
    layer = _layer(tp, cp)
    features = (heads + copies * 2 * kv + heads) * D // tp
    want = CollectiveCount(2, tokens * features * BF16)
    assert layer.forward["all_to_all"] == layer.backward["all_to_all"] == want
    kept = kernels_bytes_per_token(GROUPED, tp, "norm+act")
    kept += (heads + (copies - 1) * 2 * kv) * D // tp * BF16
    places = 8 * copies * kv // tp if copies > 1 else 0
    assert layer.alive_bytes == tokens * kept + places
    # Beside these tp's of the part, and FSDP's: a layer's weights twice, and its gradients.
    calls = {kind: count.calls for kind, count in layer.collectives.items()}
    assert calls == {"all_gather": 6 + 2, "reduce_scatter": 4 + 1, "all_reduce": 1, "all_to_all": 4}
    assert layer.forward["reduce_scatter"].bytes == 2 * tokens * GROUPED.hidden * BF16


TOKENS = BATCH * BF16 * 2 * kv * D
"""Bytes of a position's keys and values."""


@pytest.mark.parametrize("rank", range(4))
def test_bytes_of_a_ring(rank):
    """Keys and values, of their own heads, of stretches that a causal mask shows.

    A place before this one in the sequence's first half sends its first stretch, one behind it
    both; and so on for what is sent. The larger of both directions is counted.
    """
    R, stretch = 4, LENGTH // 8
    rows = 0
    for h in range(1, R):
        received, sent = (stretch * (1 if there else 2) for there in (rank >= h, rank + h < R))
        rows += max(received, sent)
    layer = _layer(1, R, rank, cp_mode="ring")
    assert layer.forward["all_to_all"] == CollectiveCount(R - 1, rows * TOKENS)
    # The same again, and gradients back.
    assert layer.backward["all_to_all"] == CollectiveCount(2 * (R - 1), 2 * rows * TOKENS)
    # What tp keeps of that part, and nothing else.
    tokens = BATCH * LENGTH // R
    assert layer.alive_bytes == tokens * kernels_bytes_per_token(GROUPED, 1, "norm+act")


@pytest.mark.parametrize("rank", range(4))
def test_a_windows_hops(rank):
    """Each stretch needs the one before it: two hops for any number of places."""
    R, stretch = 4, LENGTH // 8
    layer = _layer(1, R, rank, 32, cp_mode="ring")
    # The first stretches go one place up, the second ones one down; the ends have no neighbour.
    assert layer.forward["all_to_all"] == CollectiveCount(2, 2 * stretch * TOKENS)
    assert layer.backward["all_to_all"] == CollectiveCount(4, 4 * stretch * TOKENS)


def test_bytes_of_a_hybrid():
    """Of a half of the heads: Ulysses' exchange of two ranks, and the ring's of two places."""
    layer = _layer(1, 4, 0, cp_mode="hybrid")
    tokens, half = BATCH * LENGTH // 4, LENGTH // 2
    heads_sent = CollectiveCount(2, tokens * (2 * heads + 2 * kv) * D * BF16)
    around = CollectiveCount(1, half * TOKENS // 2)
    assert layer.forward["all_to_all"] == heads_sent + around
    assert layer.backward["all_to_all"] == heads_sent + around + around


def _hops(mask, S: int, R: int, rank: int):
    parts = Parts(Axis("", R, rank), 1, R, None, Axis("", R, rank))
    return [*ring.hops_of(mask, S, parts)]


@pytest.mark.parametrize("S", [2**16, 2**16 - 15])
@pytest.mark.parametrize("R", [2, 8])
def test_work_of_a_causal_ring_is_even(S, R):
    """Pairs that are seen, and rows times columns of kernels: within 2 % of the mean."""
    seen, area = [], []
    for rank in range(R):
        tiles = [t for hop in _hops(Band(S, S, 0), S, R, rank) for t in hop.tiles]
        assert all(t.masked is None for t in tiles)
        area.append(sum(t.n * t.m for t in tiles))
        seen.append(sum(t.n * (t.n + 1) // 2 if t.causal else t.n * t.m for t in tiles))
    assert sum(seen) == S * (S + 1) // 2
    for work in (seen, area):
        assert max(work) < 1.02 * sum(work) / R
        assert min(work) > 0.98 * sum(work) / R


def test_work_of_a_window():
    """Kernels compute a quarter more than is seen: tiles of 1024 queries, a window of 4096."""
    S, R, window = 2**16, 4, 4096
    area = [
        sum(t.n * t.m for hop in _hops(Band(S, window - 1, 0), S, R, rank) for t in hop.tiles)
        for rank in range(R)
    ]
    seen = S * window - window * (window - 1) // 2
    assert sum(area) < 1.27 * seen
    assert max(area) < 1.05 * sum(area) / R


@pytest.mark.parametrize("R", [2, 4])
def test_a_hop_that_nobody_sees_costs_nothing(R):
    """Documents of one stretch each, in one row and of the same length in all: no hop at all."""
    S = 64
    size = S // (2 * R)
    first = torch.arange(S) // size * size
    mask = Intervals(first[None], torch.arange(S)[None], torch.device("cpu"))
    for rank in range(R):
        hops = _hops(mask, S, R, rank)
        assert [hop.number for hop in hops] == [0]
        assert [(t.query, t.key, t.causal) for t in hops[0].tiles] == [
            (0, 0, True),
            (size, size, True),
        ]
