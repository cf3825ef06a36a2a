"""What context parallelism sends and keeps, counted: Jacobs et al. 2023's volume, to the byte."""

from __future__ import annotations

import functools

import pytest
import torch
from parity.test_cost import GROUPED, _config
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_sp import parallelize
from hf_sp.estimate import CollectiveCount, count_step, fake_tensors, fake_world, per_layer
from hf_sp.model.fsdp import make_buffers
from scripts.bench._cost.layers import kernels_bytes_per_token

pytestmark = pytest.mark.slow

LENGTH, BATCH, BF16 = 512, 2, 2
heads, kv, D = GROUPED.heads, GROUPED.kv_heads, GROUPED.head_dim


@functools.cache
def _step(tp: int, cp: int, layers: int):
    with fake_world(tp * cp), fake_tensors():
        model = AutoModelForCausalLM.from_config(_config(LlamaConfig, GROUPED, layers, 128))
        model = parallelize(model.train(), tp=tp, cp=cp)
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
        make_buffers(model)  # as after a first step
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def _layer(tp: int, cp: int):
    return per_layer(*(_step(tp, cp, layers) for layers in (2, 3)))


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
