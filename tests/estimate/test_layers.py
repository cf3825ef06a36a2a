"""Steps and whole decoder layers, held against the closed forms to the byte."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from hf_sp.errors import ConfigError
from hf_sp.estimate import (
    CollectiveCount,
    StepCount,
    count_step,
    fake_tensors,
    fake_world,
    per_layer,
)
from scripts.bench._cost.layers import (
    kernels_bytes_per_token,
    kernels_tp_bytes_per_token,
    sp_gathered_bytes_per_token,
    sp_shard_bytes_per_token,
    tp_bytes_per_token,
)
from scripts.bench.step_cost import (
    LAYOUTS,
    SHAPES,
    count_layer,
    dtensor_sp,
    hf_native,
    make_config,
    unsharded,
)


@pytest.fixture(autouse=True)
def _leaves_no_process_group():
    assert not dist.is_initialized()
    yield
    assert not dist.is_initialized()


def test_per_layer_is_the_difference_shared_out():
    one = StepCount(10, 20, {"all_reduce": CollectiveCount(1, 4)}, {})
    three = StepCount(
        30, 60, {"all_reduce": CollectiveCount(5, 12)}, {"all_gather": CollectiveCount(2, 8)}
    )
    layer = per_layer(one, three, 2)
    assert (layer.alive_bytes, layer.peak_bytes) == (10, 20)
    assert layer.collectives == {
        "all_reduce": CollectiveCount(2, 4),
        "all_gather": CollectiveCount(1, 4),
    }
    assert (layer.payload_bytes, layer.wire_bytes) == (8, 12)
    with pytest.raises(ConfigError, match="do not cost the same"):
        per_layer(one, three, 3)
    with pytest.raises(ConfigError, match="layers=0"):
        per_layer(one, three, 0)


def test_refusals_leave_nothing_behind():
    with pytest.raises(ConfigError, match="returned float"):
        count_step(lambda: 1.0)
    with pytest.raises(ConfigError, match="requires_grad=False"):
        count_step(lambda: torch.ones(()))
    with pytest.raises(ConfigError, match="rank=2"), fake_world(2, rank=2):
        pass
    with fake_world(2), pytest.raises(ConfigError, match="fake, 2 ranks"), fake_world(4):
        pass
    with pytest.raises(KeyError), fake_world(2), fake_tensors(torch.float16):
        raise KeyError
    assert torch.get_default_dtype() == torch.float32


# The small shape: h = 512, f = 1792, 8 heads of 64, C = (4*512 + 4*512 + 4*8)/t = 4128/t.
# HF's native TP keeps 16h + 8 + C + 8f/t, torch's DTensor TP + SP 4h + (12h + 8)/t + C + 8f/t,
# SP over HF's own modules (16h + 8)/t + C + 8f/t, hf_sp (4h + 8)/t + C + 4f/t.
SMALL = SHAPES["small"]
SEQ = 128


@cache
def layer_of(layout: str, tp: int) -> StepCount:
    return count_layer(SMALL, tp, SEQ, LAYOUTS[layout][0], base=1)[0]


@pytest.mark.parametrize(
    ("layout", "formula", "tp", "expected"),
    [
        ("unsharded", None, 2, 26664),
        ("HF native TP", tp_bytes_per_token, 2, 17432),
        ("HF native TP", tp_bytes_per_token, 4, 12816),
        ("DTensor TP+SP", sp_gathered_bytes_per_token, 2, 14356),
        ("DTensor TP+SP", sp_gathered_bytes_per_token, 4, 8202),
        ("hf_sp sp=False kernels=False", tp_bytes_per_token, 2, 17432),
        ("hf_sp sp=False kernels=False", tp_bytes_per_token, 4, 12816),
        ("hf_sp sp=True kernels=False", sp_shard_bytes_per_token, 2, 13332),
        ("hf_sp sp=True kernels=False", sp_shard_bytes_per_token, 4, 6666),
        ("hf_sp sp=False", kernels_tp_bytes_per_token, 2, 7704),
        ("hf_sp sp=True", kernels_bytes_per_token, 2, 6676),
        ("hf_sp sp=True", kernels_bytes_per_token, 4, 3338),
    ],
)
def test_bytes_a_layer_keeps_per_token(layout, formula, tp, expected):
    assert layer_of(layout, tp).alive_bytes == expected * SEQ
    if formula is not None:
        assert formula(SMALL, tp) == expected


@pytest.mark.parametrize(
    ("layout", "forward", "backward"),
    [
        ("HF native TP", {"all_reduce": 2}, {"all_reduce": 5}),
        (
            "DTensor TP+SP",
            {"all_gather": 2, "reduce_scatter": 2},
            {"all_gather": 2, "reduce_scatter": 2},
        ),
        ("hf_sp sp=False", {"all_reduce": 2}, {"all_reduce": 2}),
        (
            "hf_sp sp=True",
            {"all_gather": 2, "reduce_scatter": 2},
            {"all_gather": 4, "reduce_scatter": 2},
        ),
    ],
)
def test_collectives_of_a_layer(layout, forward, backward):
    layer = layer_of(layout, 2)
    hidden = SEQ * SMALL.hidden * 2  # [S, H] in bfloat16: what each of them carries

    def carrying(counts):
        # hf_sp's two norm weights have one small all-reduce beside these, in float32.
        big = {k: c for k, c in counts.items() if c.bytes >= c.calls * hidden}
        small = {k: c for k, c in counts.items() if k not in big}
        assert all((c.calls, c.bytes) == (1, 2 * SMALL.hidden * 4) for c in small.values())
        assert all(c.bytes == c.calls * hidden for c in big.values())
        return {k: c.calls for k, c in big.items()}

    assert carrying(layer.forward) == forward
    assert carrying(layer.backward) == backward


@pytest.mark.parametrize("layout", [unsharded, hf_native, dtensor_sp])
def test_fake_tensors_cost_what_real_ones_do(layout):
    def count(context) -> StepCount:
        with fake_world(2) as mesh:
            apply = layout(mesh)
            with context:
                model = apply(LlamaForCausalLM(make_config(SMALL, SEQ, layers=1)))
                ids = torch.zeros(1, SEQ, dtype=torch.long)
                return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)

    assert count(nullcontext()) == count(fake_tensors(torch.float32))
