"""What a training step costs, exactly: the planned collectives and nothing else, and bytes alive.

Counted under a fake process group and fake tensors with the code itself, so at shapes that fit no
machine here too; and once on real ranks, which must agree with the fake ones.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness.pool import pool
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_sp import parallelize
from hf_sp.comm import collectives as comm
from hf_sp.estimate import count_step, fake_tensors, fake_world, per_layer
from hf_sp.kernels.cross_entropy_steps import LossTerms
from hf_sp.model.chunks import HeadSpec
from hf_sp.model.loss import linear_cross_entropy
from parity import cost_jobs
from scripts.bench._cost.layers import (
    LayerShape,
    kernels_bytes_per_token,
    kernels_tp_bytes_per_token,
    sp_shard_bytes_per_token,
    tp_bytes_per_token,
)

# A name that transformers makes no mask for (hf_sp.estimate.fake_tensors says why).
# No kernel of a CPU has soft caps.
AttentionInterface.register(
    "without_mask", lambda *args, softcap=None, **more: sdpa_attention_forward(*args, **more)
)

SMALL = LayerShape(512, 1792, 8, 8, 64)
GROUPED = LayerShape(512, 1792, 8, 4, 64)
LLAMA_8B = LayerShape(4096, 14336, 32, 8, 128)
LLAMA_70B = LayerShape(8192, 28672, 64, 8, 128)


def _config(cls, shape, layers, vocab):
    return cls(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=layers,
        vocab_size=vocab,
        max_position_embeddings=16384,
        attn_implementation="without_mask",
    )


@functools.cache
def _step(cls, shape, tp, sp, layers, batch=1, length=256, chunk=4096, vocab=128, **options):
    with fake_world(tp) as mesh, fake_tensors():
        model = AutoModelForCausalLM.from_config(_config(cls, shape, layers, vocab)).train()
        model = parallelize(model, sp=sp, mesh=mesh, loss_chunk=chunk, **options)
        ids = torch.zeros(batch, length, dtype=torch.long)
        return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)


def _layer(cls, shape, tp, sp, **kwargs):
    return per_layer(
        _step(cls, shape, tp, sp, 2, **kwargs), _step(cls, shape, tp, sp, 3, **kwargs), 1
    )


def _calls(counts):
    return {kind: count.calls for kind, count in counts.items() if count.calls}


SHAPES = [
    (SMALL, 2, 1, 256),
    (SMALL, 2, 3, 256),
    (SMALL, 4, 2, 256),
    (GROUPED, 2, 2, 256),
    (LLAMA_8B, 2, 1, 8192),
    (LLAMA_8B, 4, 1, 8192),
    (LLAMA_8B, 8, 1, 8192),
    (LLAMA_8B, 8, 2, 4096),
    (LLAMA_70B, 8, 1, 8192),
]
AT = ("shape", "tp", "batch", "length")


@pytest.mark.parametrize(
    (*AT, "recompute"),
    [
        *((*shape, "norm+act") for shape in SHAPES),
        *((*shape, way) for shape in SHAPES[1::4] for way in ("none", "norm")),
    ],
    ids=str,
)
def test_the_frontier(shape, tp, batch, length, recompute):
    """Row d2 of the published accounting and the two before it, to the byte; the bar is 3 %."""
    options = {"batch": batch, "length": length, "recompute": recompute}
    layer = _layer(LlamaConfig, shape, tp, True, **options)
    assert layer.alive_bytes / (batch * length) == kernels_bytes_per_token(shape, tp, recompute)


def test_the_default_is_the_least():
    layers = [_layer(LlamaConfig, SMALL, 2, True, recompute=r) for r in ("norm+act", None)]
    assert layers[0] == layers[1]


def test_shares_of_plain_tp():
    """Of what plain TP keeps with these kernels Megatron's SP keeps 38 %, the default 26 %."""
    step = functools.partial(_layer, LlamaConfig, LLAMA_8B, 8, length=8192)
    plain_tp, megatron = (step(sp=sp, recompute="none").alive_bytes for sp in (False, True))
    assert round(100 * megatron / plain_tp) == 38
    assert round(100 * step(sp=True).alive_bytes / plain_tp) == 26


@pytest.mark.parametrize("recompute", ["none", "norm", "norm+act"])
def test_recompute_issues_no_collective_more(recompute):
    layer = _layer(LlamaConfig, GROUPED, 4, True, recompute=recompute)
    assert _calls(layer.collectives) == {"all_gather": 6, "reduce_scatter": 4, "all_reduce": 1}


@pytest.mark.parametrize(AT, SHAPES, ids=str)
def test_only_shards_are_saved(shape, tp, batch, length):
    """With HF's own norms and activations too, to the byte."""
    options = {"batch": batch, "length": length, "kernels": False}
    layer = _layer(LlamaConfig, shape, tp, True, **options)
    measured = layer.alive_bytes / (batch * length)
    assert measured == sp_shard_bytes_per_token(shape, tp)
    if tp == 8:
        assert measured < tp_bytes_per_token(shape, tp) / 3


@pytest.mark.parametrize("tp", [2, 4])
def test_plain_tp_saves_what_tp_does(tp):
    layer = _layer(LlamaConfig, SMALL, tp, False, kernels=False)
    assert layer.alive_bytes / 256 == tp_bytes_per_token(SMALL, tp)


@pytest.mark.parametrize("tp", [2, 4])
def test_plain_tp_makes_norms_and_products_again_too(tp):
    layer = _layer(LlamaConfig, SMALL, tp, False)
    assert layer.alive_bytes / 256 == kernels_tp_bytes_per_token(SMALL, tp)


@pytest.mark.parametrize("tp", [2, 4])
def test_gemma_keeps_what_llama_keeps(tp):
    """GeGLU is made again as SwiGLU is."""
    shape = LayerShape(512, 1792, 8, 4, 64)
    config = functools.partial(GemmaConfig, hidden_act="gelu_pytorch_tanh")
    for recompute in ("none", "norm", "norm+act"):
        layer = _layer(config, shape, tp, True, recompute=recompute)
        assert layer.alive_bytes / 256 == kernels_bytes_per_token(shape, tp, recompute)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("cls", [Gemma2Config, Gemma3TextConfig])
def test_a_layer_of_gemma_2_and_3(cls, tp):
    """Behind each exit a norm keeps what comes out; Gemma 3's norms of queries and keys as below.

    All of it is divided. Without Gemma 2's soft caps.
    """
    shape = LayerShape(512, 1792, 8, 4, 64)
    layer = _layer(cls, shape, tp, True)
    heads = shape.heads + shape.kv_heads
    behind = (4 * shape.hidden + 8) / tp
    inputs = 0.0 if cls is Gemma2Config else (2 * heads * shape.head_dim + 4 * heads) / tp
    assert layer.alive_bytes / 256 == kernels_bytes_per_token(shape, tp) + behind + inputs
    assert _calls(layer.collectives) == {"all_gather": 6, "reduce_scatter": 4, "all_reduce": 1}


@pytest.mark.parametrize("tp", [2, 4])
def test_packed_gate_and_up(tp):
    """GLM-4 has them in one linear: what is made again is what two linears would keep."""
    shape = LayerShape(512, 1792, 8, 4, 64)
    step = functools.partial(_layer, functools.partial(Glm4Config, pad_token_id=None), shape, tp)
    none, norm, act = (step(True, recompute=r).alive_bytes for r in ("none", "norm", "norm+act"))
    assert (none - norm) / 256 == 4 * shape.hidden / tp
    assert (norm - act) / 256 == 2 * shape.intermediate / tp


@pytest.mark.parametrize("tp", [2, 4])
def test_norms_of_queries_and_keys(tp):
    """q_norm and k_norm keep their inputs and one float32 a row of head_dim."""
    shape = LayerShape(512, 1792, 8, 4, 64)
    layer = _layer(Qwen3Config, shape, tp, True)
    heads = shape.heads + shape.kv_heads
    inputs = (2 * heads * shape.head_dim + 4 * heads) / tp
    assert layer.alive_bytes / 256 == kernels_bytes_per_token(shape, tp) + inputs


@pytest.mark.parametrize(
    ("cls", "partial"),
    [(LlamaConfig, 2 * 512), (Qwen2Config, 2 * 512), (Qwen3Config, 2 * 512 + 2 * 64)],
)
def test_collectives_of_a_layer_are_the_planned_ones(cls, partial):
    """6 all-gathers, 4 reduce-scatters, and one small sum of all partial gradients, in float32."""
    layer = _layer(cls, GROUPED, 4, True)
    assert _calls(layer.forward) == {"all_gather": 2, "reduce_scatter": 2}
    assert _calls(layer.backward) == {
        "all_gather": 4,
        "reduce_scatter": 2,
        "all_reduce": 1,
    }
    tokens, itemsize = 256, 2
    whole = tokens * GROUPED.hidden * itemsize
    assert layer.collectives["all_gather"].bytes == 6 * whole
    assert layer.collectives["reduce_scatter"].bytes == 4 * whole
    assert layer.collectives["all_reduce"].bytes == partial * 4


class _Copies(TorchDispatchMode):
    """Counts the tensors of at least ``numel`` elements that are put together from others."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.found = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        joins = func._overloadpacket.__name__ in ("cat", "constant_pad_nd")
        self.found += joins and result.numel() >= self.numel
        return result


@pytest.mark.parametrize("batch", [1, 2])
def test_a_length_that_tp_does_not_divide_is_padded_without_a_copy(batch):
    """Of a layer, forward and backward; the ends of the stack pad a shard's worth once."""
    found = []
    for layers in (1, 2):
        with fake_world(4) as mesh, fake_tensors(), _Copies(batch * 253 * 512) as copies:
            model = AutoModelForCausalLM.from_config(_config(LlamaConfig, SMALL, layers, 128))
            model = parallelize(model.train(), mesh=mesh)
            ids = torch.zeros(batch, 253, dtype=torch.long)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(copies.found)
    assert found[0] == found[1]


def test_collectives_of_a_plain_tp_layer():
    layer = _layer(LlamaConfig, GROUPED, 4, False)
    assert _calls(layer.forward) == {"all_reduce": 2}
    assert _calls(layer.backward) == {"all_reduce": 2}


@pytest.mark.parametrize("chunks", [1, 4])
def test_collectives_around_the_layers(chunks):
    """Embedding and loss, whatever the number of layers: the final gather is the loss's."""
    step = _step(LlamaConfig, GROUPED, 4, True, 2, chunk=256 // chunks)
    assert _calls(step.forward) == {
        "all_gather": 2 * 2 + 2 * chunks,  # layers, a chunk's hidden states and statistics
        "reduce_scatter": 1 + 2 * 2 + chunks,  # embedding, layers, loss gradient
    }
    assert _calls(step.backward) == {
        "all_reduce": 2 + 1,  # the norms of each layer, and the final one
        "all_gather": 2 * 4 + 1,  # layers, entry of the stack
        "reduce_scatter": 2 * 2,
    }


@pytest.mark.parametrize("chunks", [1, 4])
def test_collectives_with_kept_logits(chunks):
    """Whole hidden states go to the head, as to anyone: their gradient is all-reduced."""
    options = {"chunk": 256 // chunks, "keep_logits": True}
    step = _step(LlamaConfig, GROUPED, 4, True, 2, **options)
    assert _calls(step.forward) == {
        "all_reduce": chunks,  # loss gradient
        "all_gather": 2 * 2 + 1 + chunks + 1,  # layers, final norm, statistics, logits
        "reduce_scatter": 1 + 2 * 2,  # embedding, layers
    }
    default = _step(LlamaConfig, GROUPED, 4, True, 2, chunk=256 // chunks)
    # One [B, S, H] a step, in chunks, where the default reduce-scatters it.
    assert step.forward["all_reduce"].bytes == 256 * GROUPED.hidden * 2
    assert step.backward == default.backward


def test_estimate_without_a_mesh_at_hand():
    """parallelize builds its own mesh under fake tensors too."""
    with fake_world(4), fake_tensors():
        model = AutoModelForCausalLM.from_config(_config(LlamaConfig, SMALL, 1, 128)).train()
        model = parallelize(model, tp=4)
        ids = torch.zeros(1, 64, dtype=torch.long)
        step = count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
    assert step.forward["reduce_scatter"].calls == 4


def test_logits_never_exist():
    """The peak does not grow with the vocabulary times the tokens: one chunk of it is alive."""
    sizes = {
        vocab: _step(LlamaConfig, SMALL, 4, True, 2, length=4096, chunk=256, vocab=vocab).peak_bytes
        for vocab in (4096, 8192)
    }
    added = sizes[8192] - sizes[4096]
    # Gradients of the added rows with their float32 sums, and a chunk's logits in bf16.
    rows, chunk = 4096 // 4 * 512 * (2 + 4), 256 * 4096 // 4 * 2
    assert added <= rows + chunk
    assert rows + chunk < 4096 * 4096 * 2


def _loss_peak(vocab, length, chunk, **options):
    with fake_world(4) as mesh, fake_tensors():
        hidden = torch.zeros(1, length // 4, 512, requires_grad=True)
        weight = torch.zeros(vocab // 4, 512, requires_grad=True)
        labels = torch.zeros(1, length, dtype=torch.long)
        spec = HeadSpec(LossTerms(vocab, **options), comm.Axis.of(mesh), True, chunk)
        loss = functools.partial(linear_cross_entropy, hidden, weight, None, labels, spec)
        return count_step(loss).peak_bytes


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}], ids=str)
def test_a_logit_of_a_chunk_takes_two_bytes(options):
    """Exactly: the gradient takes the logits' place, and float32 is held by slabs only."""
    small, large = (_loss_peak(vocab, 4096, 4096, **options) for vocab in (65536, 131072))
    columns = (131072 - 65536) // 4
    assert large - small == columns * (4096 * 2 + 512 * 2)  # logits, the head's gradient


def test_the_peak_grows_with_the_sequence_by_the_shards_gradient_alone():
    small, large = (_loss_peak(65536, length, 2048) for length in (8192, 16384))
    assert large - small == 8192 * (512 * 2 // 4 + 8)  # its share, and the labels of all


def test_real_ranks_agree_with_the_fake_world():
    """Same collectives, in the same order with the same sizes on every rank."""
    logs = pool(2).run(cost_jobs.collective_log, sp=True)
    assert logs[0] == logs[1]
    fake = _step(LlamaConfig, GROUPED, 2, True, 2, batch=2, length=37)
    want = _calls(fake.forward) | {f"{k} backward": n for k, n in _calls(fake.backward).items()}
    want["all_gather"] += 1  # digests of the inputs, which a world of one process does not compare
    assert logs[0]["calls"] == want
