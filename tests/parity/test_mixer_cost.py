"""What a layer with a Mamba-2 costs: a dense layer's collectives, and 1/tp of the bytes."""

from __future__ import annotations

import functools

import torch
from transformers import AutoModelForCausalLM, BambaConfig

from hf_sp import parallelize
from hf_sp.estimate import count_step, fake_tensors, fake_world, per_layer

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "vocab_size": 128,
    "mamba_n_heads": 16,
    "mamba_d_head": 64,
    "mamba_n_groups": 8,
    "mamba_d_state": 32,
    "mamba_chunk_size": 64,
}


@functools.cache
def _step(tp, layers, length):
    config = BambaConfig(**SIZES, num_hidden_layers=layers)
    with fake_world(tp) as mesh, fake_tensors():
        model = AutoModelForCausalLM.from_config(config).train()
        model = parallelize(model, mesh=mesh)
        ids = torch.zeros(1, length, dtype=torch.long)
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def _layer(tp, length):
    return per_layer(_step(tp, 1, length), _step(tp, 2, length), 1)


def test_the_collectives_of_a_dense_layer():
    calls = {kind: n.calls for kind, n in _layer(4, 256).collectives.items() if n.calls}
    assert calls == {"all_gather": 6, "reduce_scatter": 4, "all_reduce": 1}


def test_what_grows_with_tokens_is_divided():
    """To the byte, whatever transformers' scan keeps: each rank has its heads' part of it."""
    whole, part = (_layer(tp, 512).alive_bytes - _layer(tp, 256).alive_bytes for tp in (1, 4))
    # Two masks of chunks by chunks, of 64 tokens, and a state before the first.
    same = 2 * (9**2 - 5**2)
    assert (part - same) * 4 == whole - same > 0
