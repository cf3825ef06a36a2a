"""What a layer with a token mixer costs: a dense layer's collectives, and 1/tp of the bytes."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig, Qwen3_5TextConfig

from hf_sp import parallelize
from hf_sp.estimate import count_step, fake_tensors, fake_world, per_layer

BASE = {"hidden_size": 512, "intermediate_size": 1792, "vocab_size": 128}
MIXERS = {
    "gated_delta_net": (
        Qwen3_5TextConfig,
        {
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
        },
    ),
    "mamba_2": (
        BambaConfig,
        {
            "mamba_n_heads": 16,
            "mamba_d_head": 64,
            "mamba_n_groups": 8,
            "mamba_d_state": 32,
            "mamba_chunk_size": 64,
        },
    ),
}


@functools.cache
def _step(mixer, tp, layers, length):
    cls, sizes = MIXERS[mixer]
    types = {"layer_types": ["linear_attention"] * layers} if cls is Qwen3_5TextConfig else {}
    config = cls(**BASE, **sizes, **types, num_hidden_layers=layers)
    with fake_world(tp) as mesh, fake_tensors():
        model = AutoModelForCausalLM.from_config(config).train()
        model = parallelize(model, mesh=mesh)
        ids = torch.zeros(1, length, dtype=torch.long)
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def _layer(mixer, tp, length):
    return per_layer(_step(mixer, tp, 1, length), _step(mixer, tp, 2, length), 1)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_collectives_of_a_dense_layer(mixer):
    calls = {kind: n.calls for kind, n in _layer(mixer, 4, 256).collectives.items() if n.calls}
    assert calls == {"all_gather": 6, "reduce_scatter": 4, "all_reduce": 1}


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_grows_with_tokens_is_divided(mixer):
    """To the byte, whatever transformers' scan keeps: each rank has its heads' part of it."""
    whole, part = (
        _layer(mixer, tp, 512).alive_bytes - _layer(mixer, tp, 256).alive_bytes for tp in (1, 4)
    )
    assert part * 4 == whole > 0
