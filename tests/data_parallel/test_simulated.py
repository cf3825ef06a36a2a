"""A 70B over 64 ranks, eight of them a node: one rank of it, with the code, and no rank at all.

What a group costs with its neighbours is what it costs alone, and FSDP's collectives: their payload
is one layer's tp shard. So the collectives of each axis are known by subtraction.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from parity.test_cost import LLAMA_70B, _config
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sp import parallel_state, parallelize
from hf_sp.comm.degrees import Degrees
from hf_sp.comm.mesh import build_mesh
from hf_sp.estimate import CollectiveCount, count_step, fake_tensors, fake_world, per_layer
from hf_sp.model.fsdp import make_buffers
from scripts.bench._cost.layers import kernels_bytes_per_token

pytestmark = pytest.mark.slow

TP, GROUPS, LENGTH, VOCAB = 8, 8, 8192, 128256
h, f, kv = LLAMA_70B.hidden, LLAMA_70B.intermediate, LLAMA_70B.kv_heads * LLAMA_70B.head_dim
MATRICES = 2 * h * h + 2 * h * kv + 3 * h * f
NORMS = 2 * h


@functools.cache
def rank_of(layers: int, groups: int, rank: int):
    """What rank `rank` of `TP * groups` stores and does in a step."""
    degrees = {"dp_shard": groups} if groups > 1 else {}
    with fake_world(TP * groups, rank):
        with fake_tensors():
            model = AutoModelForCausalLM.from_config(_config(LlamaConfig, LLAMA_70B, layers, VOCAB))
            model = parallelize(model.train(), tp=TP, **degrees)
            state = parallel_state(model)
            stored = sum(p.to_local().numel() for p in model.parameters())
            ids = torch.zeros(1, LENGTH, dtype=torch.long)
            make_buffers(model)  # as after a first step
            step = count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
        meshes = state.mesh.mesh.tolist(), state.whole.mesh.view(-1, TP).tolist()
    return step, stored, *meshes


@pytest.mark.parametrize("rank", [0, 19, 63])
def test_groups_are_neighbours(rank):
    _, _, group, whole = rank_of(2, GROUPS, rank)
    first = rank // TP * TP
    assert group == list(range(first, first + TP))
    assert whole == [list(range(i * TP, i * TP + TP)) for i in range(GROUPS)]


def layer_of(groups: int):
    two, three = (rank_of(layers, groups, 19 if groups > 1 else 3)[0] for layers in (2, 3))
    return per_layer(two, three)


def test_a_rank_stores_its_part():
    """1/64 of the matrices; of the norms, which tp replicates, 1/8."""
    stored = rank_of(3, GROUPS, 19)[1] - rank_of(2, GROUPS, 19)[1]
    assert stored == MATRICES // (TP * GROUPS) + NORMS // GROUPS


def test_what_is_kept_for_backward_is_the_groups_own():
    assert layer_of(GROUPS).alive_bytes == layer_of(1).alive_bytes
    assert layer_of(1).alive_bytes == kernels_bytes_per_token(LLAMA_70B, TP, "norm+act") * LENGTH


def test_the_documented_numbers():
    """Of the 70B: 80 layers, embedding and head."""
    text = (Path(__file__).parents[2] / "docs" / "nodes.md").read_text()
    layer = layer_of(GROUPS).alive_bytes
    stored = 80 * (MATRICES // (TP * GROUPS) + NORMS // GROUPS) + 2 * VOCAB * h // (TP * GROUPS)
    prose = " ".join(text.split())
    assert f"{layer / 2**20:.1f} MiB a layer" in prose
    weights, states = (f"{n * stored / 2**30:.1f}" for n in (2, 4))
    found = f"{weights} GiB of weights, {weights} of gradients, {states} of optimizer state"
    assert f"{found}, and {80 * layer / 2**30:.1f} GiB for the backward" in prose


def test_collectives_of_each_axis():
    """Those of tp, which the cost tests hold, and FSDP's: a layer's shard twice, and back."""
    alone, spread = layer_of(1), layer_of(GROUPS)
    shard = CollectiveCount(1, 2 * (MATRICES // TP + NORMS))
    for phase, more in (
        ("forward", {"all_gather": shard}),
        ("backward", {"all_gather": shard, "reduce_scatter": shard}),
    ):
        mine, theirs = getattr(spread, phase), getattr(alone, phase)
        none = CollectiveCount()
        found = {k: mine[k] - theirs.get(k, none) for k in mine}
        assert {k: c for k, c in found.items() if c != none} == more


@pytest.mark.parametrize(("tp", "local", "warned"), [(8, 8, 0), (4, 8, 0), (16, 8, 1), (16, 16, 0)])
def test_a_group_over_nodes_is_warned_of(tp, local, warned, monkeypatch, caplog):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    with fake_world(16):
        build_mesh(Degrees(tp, dp_shard=16 // tp), None)
    assert len([r for r in caplog.records if "several nodes" in r.message]) == warned
