"""What is alive of long rows: inputs on the host, own tokens of the embedding, MLPs in tiles."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from parity.test_cost import GROUPED, _config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sp import parallelize
from hf_sp.estimate import count_step, fake_tensors, fake_world, per_layer
from hf_sp.model.fsdp import make_buffers

pytestmark = pytest.mark.slow

LENGTH, BATCH, BF16 = 768, 2, 2


@functools.cache
def _step(
    tp, cp, layers, *, shape=GROUPED, length=LENGTH, checkpointed=False, touched=False, **switches
):
    with fake_world(tp * cp), fake_tensors():
        model = AutoModelForCausalLM.from_config(_config(LlamaConfig, shape, layers, 128))
        model = parallelize(model.train(), tp=tp, cp=cp, **switches)
        if checkpointed:
            model.gradient_checkpointing_enable()
        if touched:
            model.model.embed_tokens.register_forward_hook(lambda m, args, output: output + 0)
        ids = torch.zeros(BATCH, length, dtype=torch.long)
        make_buffers(model)  # as after a first step
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def _layer(tp, cp, **switches):
    return per_layer(*(_step(tp, cp, layers, **switches) for layers in (2, 3)))


def test_a_checkpointed_layer_keeps_its_input_or_nothing():
    """On the host it is no byte of the device's; all else is sent and kept as without."""
    here, there = (_layer(2, 4, checkpointed=True, offload=offload) for offload in (False, True))
    shard = BATCH * LENGTH // 8 * GROUPED.hidden * BF16
    assert (here.alive_bytes, there.alive_bytes) == (shard, 0)
    assert here.collectives == there.collectives


@pytest.mark.parametrize(("tp", "cp", "sp"), [(1, 4, True), (2, 2, True), (2, 2, False)])
def test_the_embedding_is_of_own_tokens(tp, cp, sp):
    """No tensor of all tokens' hidden states is made; some are, where a hook reads it."""
    with _Whole() as alone:
        step = _step(tp, cp, 1, sp=sp)
    with _Whole() as touched:
        _step(tp, cp, 1, sp=sp, touched=True)
    assert alone.found == 0 < touched.found
    kind = "reduce_scatter" if sp else "all_reduce"
    # Of the part: also the layer's two exits, and the loss's gradient. And the loss, a number.
    part = BATCH * LENGTH // cp * GROUPED.hidden * BF16
    assert step.forward[kind].bytes == 4 * part + (0 if sp else 4)


class _Whole(TorchDispatchMode):
    """Counts tensors of the hidden states of all tokens."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (GROUPED.hidden,):
            self.found += result.numel() == BATCH * LENGTH * GROUPED.hidden
        return result


TILE = 96


def test_collectives_of_an_mlp_in_tiles():
    """As many as tiles: forward, the gather again in a tile's backward, and that backward."""
    whole, tiled = (_layer(2, 2, mlp_tile=tile) for tile in (None, TILE * BATCH))
    more = {k: n.calls - whole.collectives[k].calls for k, n in tiled.collectives.items()}
    tiles = LENGTH // 4 // TILE
    assert tiles == 2
    added = tiles - 1
    # Of whole MLPs: a gather and a reduce-scatter; in backward two and one. FSDP's are a layer's.
    gathers, reductions = added + tiles + 2 * added, added + added
    want = {"all_gather": gathers, "reduce_scatter": reductions}
    assert more == dict.fromkeys(more, 0) | want


def test_features_of_an_mlp_in_tiles_are_of_one_tile():
    """What a token adds to the peak has nothing of features; without tiles it has."""

    def peak(features, length, tile):
        shape = replace(GROUPED, intermediate=features)
        return _step(2, 2, 2, shape=shape, length=length, mlp_tile=tile).peak_bytes

    def of_a_token(features, tile):
        tokens = 8 * LENGTH
        more = peak(features, 2 * tokens, tile) - peak(features, tokens, tile)
        return more / tokens

    few, many = 2048, 4096
    # Less, where weights are the peak of the shorter row.
    assert of_a_token(many, TILE) <= of_a_token(few, TILE)
    assert of_a_token(many, None) > of_a_token(few, None) + (many - few) * BF16
