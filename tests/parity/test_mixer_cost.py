"""What a layer with a mixer costs: a dense layer's collectives, and 1/tp of the bytes."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, BambaConfig, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5

from hf_sp import parallelize
from hf_sp.estimate import count_step, fake_tensors, fake_world, per_layer

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
def _step(family, tp, layers, length, padded=False):
    cls, sizes = FAMILIES[family]
    if family == "qwen3_5":
        # Not without an attention.
        kinds = ["linear_attention"] * layers + ["full_attention"]
        sizes, layers = {**sizes, "layer_types": kinds}, layers + 1
    config = cls(**SIZES, **sizes, num_hidden_layers=layers)
    with fake_world(tp) as mesh, fake_tensors():
        model = AutoModelForCausalLM.from_config(config).train()
        model = parallelize(model, mesh=mesh)
        ids = torch.zeros(1, length, dtype=torch.long)
        # A fake mask is taken for one that hides something.
        more = {"attention_mask": torch.ones_like(ids)} if padded else {}
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False, **more).loss)


def _layer(family, tp, length, padded=False):
    one, two = (_step(family, tp, layers, length, padded) for layers in (1, 2))
    return per_layer(one, two, 1)


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


class _Scan(torch.autograd.Function):
    """Keeps what it is given, as kernels do."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta):
        ctx.save_for_backward(q, k, v, g, beta)
        return torch.zeros_like(v)

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_bytes_of_a_gated_delta_net(tp, monkeypatch):
    """With a kernel for the scan, of a layer in bfloat16; the fixed part does not grow with tokens.

    A token: what a dense layer keeps of norms and MLP, 4h + 8 + 4f; c = n (2k + v) channels before
    the convolution, after it, and after its activation; b's sigmoid, a with its bias, the softplus
    of that and the decay, 2n + 12n; from the scan on, the gated norm's input, its rows, the normed,
    both sides of the gate and what it is given, 18nv + 4n, of which 2nv are the row linear's input.
    Fixed: the convolution's own rows, 4 taps; 3 tokens of padding behind it; A twice.
    """
    name = "torch_chunk_gated_delta_rule"
    monkeypatch.setattr(
        modeling_qwen3_5, name, lambda q, k, v, g, beta, **_: (_Scan.apply(q, k, v, g, beta), None)
    )
    try:
        _step.cache_clear()
        layer = _layer("qwen3_5", tp, 256)
    finally:
        _step.cache_clear()
    channels = N * (2 * K + V)
    token = 4 * H + 8 + 4 * F + 3 * 2 * channels + 14 * N + 18 * N * V + 4 * N
    fixed = (4 + 3) * 2 * channels + 2 * 4 * N
    assert layer.alive_bytes * tp == 256 * token + fixed
