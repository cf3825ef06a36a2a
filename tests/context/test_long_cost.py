"""What is alive of long rows: inputs on the host, own tokens of the embedding, MLPs in tiles."""

from __future__ import annotations

import functools

import pytest
import torch
from parity.test_cost import GROUPED, _config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sp import parallelize
from hf_sp.estimate import count_step, fake_tensors, fake_world, per_layer
from hf_sp.model.fsdp import make_buffers

pytestmark = pytest.mark.slow

LENGTH, BATCH, BF16 = 512, 2, 2


@functools.cache
def _step(tp: int, cp: int, layers: int, checkpointed: bool = False, **switches):
    with fake_world(tp * cp), fake_tensors():
        model = AutoModelForCausalLM.from_config(_config(LlamaConfig, GROUPED, layers, 128))
        model = parallelize(model.train(), tp=tp, cp=cp, **switches)
        if checkpointed:
            model.gradient_checkpointing_enable()
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        make_buffers(model)  # as after a first step
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def _layer(tp: int, cp: int, **switches):
    return per_layer(*(_step(tp, cp, layers, **switches) for layers in (2, 3)))


def test_a_checkpointed_layer_keeps_its_input_or_nothing():
    """On the host it is no byte of the device's; all else is sent and kept as without."""
    here, there = (_layer(2, 4, checkpointed=True, offload=offload) for offload in (False, True))
    shard = BATCH * LENGTH // 8 * GROUPED.hidden * BF16
    assert (here.alive_bytes, there.alive_bytes) == (shard, 0)
    assert here.collectives == there.collectives


@pytest.mark.parametrize(("tp", "cp", "sp"), [(1, 4, True), (2, 2, True), (2, 2, False)])
def test_the_embedding_is_of_own_tokens(tp, cp, sp):
    """Nothing of all tokens' hidden states is made, in forward or backward; what is sent."""
    with _Widest() as widest:
        step = _step.__wrapped__(tp, cp, 1, sp=sp)
    part = BATCH * LENGTH // cp
    assert widest.tokens == part
    kind = "reduce_scatter" if sp else "all_reduce"
    # Of the layer's two exits and the loss's chunk too.
    assert step.forward[kind].bytes == 4 * part * GROUPED.hidden * BF16


class _Widest(TorchDispatchMode):
    """The most rows of hidden states in one tensor."""

    tokens = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (GROUPED.hidden,):
            weight = result.dim() == 2 and func is not torch.ops.aten.embedding.default
            self.tokens = max(self.tokens, 0 if weight else result[..., 0].numel())
        return result


TILE, TILES = 64, 4


def test_an_mlp_in_tiles():
    """The peak has no feature of all tokens: what features add is of weights and of one tile.

    Collectives are as many as tiles, forward, again in a tile's backward, and that backward.
    """
    whole, tiled = (
        per_layer(*(_step(2, 2, n, mlp_tile=tile) for n in (2, 3))) for tile in (None, TILE * BATCH)
    )
    assert LENGTH // 4 // TILE == TILES // 2
    more = {k: n.calls - whole.collectives[k].calls for k, n in tiled.collectives.items()}
    n = TILES // 2
    # Of the MLP: a gather and a reduce-scatter, and 2 and 1 in backward, of FSDP none.
    assert more == {"all_gather": 3 * (n - 1) + n, "reduce_scatter": 2 * (n - 1) + n} | {
        kind: 0 for kind in ("all_reduce", "all_to_all")
    }
