"""What a layer with a mixer costs: a dense layer's collectives, and 1/tp of the bytes."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig, Qwen3_5TextConfig

from hf_sp import parallelize
from hf_sp.estimate import CollectiveCount, count_step, fake_tensors, fake_world, per_layer
from hf_sp.model.fsdp import make_buffers
from scripts.bench._cost.scan import kernel_scan

SIZES = {"hidden_size": 512, "intermediate_size": 1792, "vocab_size": 128}
# Heads of keys, and so of values: n, of k and of v features.
H, F, N, K, V = 512, 1792, 8, 32, 64
FAMILIES = {
    "bamba": (
        BambaConfig,
        {
            "mamba_n_heads": 16,
            "mamba_d_head": 64,
            "mamba_n_groups": 8,
            "mamba_d_state": 32,
            "mamba_chunk_size": 64,
        },
    ),
    "qwen3_5": (
        Qwen3_5TextConfig,
        {
            "linear_num_key_heads": N,
            "linear_num_value_heads": N,
            "linear_key_head_dim": K,
            "linear_value_head_dim": V,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 32,
        },
    ),
}


@functools.cache
def _step(family, tp, layers, length, padded=False, cp=1):
    cls, sizes = FAMILIES[family]
    if family == "qwen3_5":
        # Not without an attention.
        kinds = ["linear_attention"] * layers + ["full_attention"]
        sizes, layers = {**sizes, "layer_types": kinds}, layers + 1
    config = cls(**SIZES, **sizes, num_hidden_layers=layers)
    with fake_world(tp * cp), fake_tensors():
        model = AutoModelForCausalLM.from_config(config).train()
        model = parallelize(model, tp=tp, cp=cp)
        if cp > 1:
            make_buffers(model)  # as after a first step
        ids = torch.zeros(1, length, dtype=torch.long)
        # A fake mask is taken for one that hides something.
        more = {"attention_mask": torch.ones_like(ids)} if padded else {}
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False, **more).loss)


def _layer(family, tp, length, padded=False, cp=1):
    two, three = (_step(family, tp, layers, length, padded, cp) for layers in (2, 3))
    return per_layer(two, three, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_collectives_of_a_dense_layer(family):
    calls = {kind: n.calls for kind, n in _layer(family, 4, 256).collectives.items() if n.calls}
    assert calls == {"all_gather": 6, "reduce_scatter": 4, "all_reduce": 1}


def test_what_grows_with_tokens_is_divided():
    """To the byte, whatever transformers' scan keeps: each rank has its heads' part of it."""
    whole, part = (
        _layer("bamba", tp, 512).alive_bytes - _layer("bamba", tp, 256).alive_bytes for tp in (1, 4)
    )
    # Two masks of chunks by chunks, of 64 tokens, and a state before the first.
    same = 2 * (9**2 - 5**2)
    assert (part - same) * 4 == whole - same > 0


def test_a_gated_delta_net_is_divided():
    """To the byte, with transformers' scan: all of it, but for a mask in a chunk of 64 tokens."""
    whole, part = (_layer("qwen3_5", tp, 256).alive_bytes for tp in (1, 4))
    assert (part - 64**2) * 4 == whole - 64**2 > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_costs_no_byte(family):
    """A layer keeps its shard or what makes it, and its ports, whatever is padded."""
    for tp in (1, 4):
        padded, plain = (_layer(family, tp, 256, padded) for padded in (True, False))
        assert padded == plain


CHANNELS = N * (2 * K + V)


@pytest.fixture
def kernel():
    """A kernel in place of transformers' scan."""
    _step.cache_clear()
    with kernel_scan():
        yield
    _step.cache_clear()


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2)])
def test_bytes_of_a_gated_delta_net(tp, cp, kernel):
    """With a kernel for the scan, of a layer in bfloat16; the fixed part does not grow with tokens.

    A token: what a dense layer keeps of norms and MLP, 4h + 8 + 4f; c = n (2k + v) channels before
    the convolution, after it, and after its activation; b's sigmoid, a with its bias, the softplus
    of that and the decay, 2n + 12n; from the scan on, the gated norm's input, its rows, the normed,
    both sides of the gate and what it is given, 18nv + 4n, of which 2nv are the row linear's input.
    Fixed: the convolution's own rows, 4 taps; 3 tokens of padding behind it; A twice.

    Over cp ranks the same: all tokens of a cp-th of the heads for a cp-th of the tokens.
    """
    layer = _layer("qwen3_5", tp, 256, cp=cp)
    token = 4 * H + 8 + 4 * F + 3 * 2 * CHANNELS + 14 * N + 18 * N * V + 4 * N
    fixed = (4 + 3) * 2 * CHANNELS + 2 * 4 * N
    assert layer.alive_bytes * tp * cp == 256 * token + fixed


@pytest.mark.parametrize(("tp", "cp"), [(1, 4), (2, 2)])
def test_what_a_gated_delta_net_exchanges(tp, cp, kernel):
    """What its linears make of a token, and what its row linear is given, each way once."""
    layer = _layer("qwen3_5", tp, 256, cp=cp)
    features = (CHANNELS + N * V + 2 * N + N * V) // tp
    want = CollectiveCount(2, 256 // cp * features * 2)
    assert layer.forward["all_to_all"] == layer.backward["all_to_all"] == want
    calls = {kind: count.calls for kind, count in layer.collectives.items()}
    # FSDP's beside tp's: a layer's weights twice, and its gradients.
    assert calls == {"all_gather": 6 + 2, "reduce_scatter": 4 + 1, "all_reduce": 1, "all_to_all": 4}
