"""LoRA on a parallelized model, in both orders: exact, whatever the feature, or refused."""

from __future__ import annotations

import pytest
from harness.parity import Case, assert_parity
from harness.pool import pool, run_once

from adapters import jobs
from adapters.jobs import Lora

ORDERS = ("before", "after")


def _fields(**fields):
    return tuple(fields.items())


FEATURES = {
    "all-linear": (Case("qwen3"), _fields(target_modules="all-linear")),
    # Gate and up in one linear, and q, k and v.
    "packed": (Case("phi3"), _fields(target_modules=("qkv_proj", "gate_up_proj", "down_proj"))),
    "rslora": (Case("llama"), _fields(use_rslora=True)),
    "some": (Case("llama_bias"), _fields(target_modules=("q_proj", "down_proj"))),
    "rank_pattern": (Case("llama"), _fields(rank_pattern=(("q_proj", 5),))),
    "bias": (Case("llama_bias"), _fields(bias="lora_only")),
    # Seed 0 meets the rounding boundary that harness/report.py tells of.
    "dora": (Case("llama_bias", checkpoint="non_reentrant", seed=1), _fields(use_dora=True)),
    # The bias of a row linear, which rank 0 adds and the magnitude does not scale.
    "dora_bias": (Case("llama_bias", seed=1), _fields(use_dora=True, bias="lora_only")),
    "dora_tp_only": (Case("qwen2", sp=False), _fields(use_dora=True)),
    "dropout": (Case("llama"), _fields(lora_dropout=0.3)),
    "dropout_tp_only": (Case("llama", sp=False), _fields(lora_dropout=0.3)),
    "dropout_checkpointed": (
        Case("llama", checkpoint="non_reentrant", accum=3),
        _fields(lora_dropout=0.3),
    ),
    "embedding_and_head": (
        Case("llama_odd_vocab"),
        _fields(target_modules=("embed_tokens", "lm_head", "v_proj")),
    ),
    "modules_to_save": (
        Case("qwen3"),
        _fields(
            target_modules=("q_proj", "down_proj"),
            modules_to_save=("embed_tokens", "lm_head", "norm", "input_layernorm", "q_norm"),
        ),
    ),
    "linear_to_save": (
        Case("llama_bias"),
        _fields(target_modules=("q_proj",), modules_to_save=("k_proj", "o_proj")),
    ),
}
GRID = {
    "checkpointed": (Case("qwen3_tied", True, "float64", "reentrant", 3, "adamw"), ()),
    "accumulated": (Case("qwen3_tied", False, "float64", "none", 3, "adamw"), ()),
    "checkpointed_tp_only": (Case("llama", False, "float64", "non_reentrant", 3, "adamw"), ()),
}
# The attention's linears, and what a shared expert has: its gate is whole in a block of parts.
SPARSE = _fields(
    target_modules=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "shared_expert_gate")
)
MOE = {
    "moe": (Case("qwen2_moe"), SPARSE),
    "moe_tp_only": (Case("qwen2_moe", sp=False, checkpoint="non_reentrant"), SPARSE),
    "moe_ep": (Case("qwen2_moe", parallelize=(("ep", 2),)), SPARSE),
    "moe_dora": (Case("qwen2_moe"), (*SPARSE, ("use_dora", True))),
    "moe_attention": (
        Case("mixtral", accum=3),
        _fields(target_modules=("q_proj", "v_proj", "o_proj"), modules_to_save=("norm",)),
    ),
}
FEATURES |= MOE
BEFORE = (
    "moe",
    "moe_ep",
    "all-linear",
    "dora",
    "dropout",
    "embedding_and_head",
    "modules_to_save",
    "checkpointed",
)
# What is packed in a mixer's linear, and, over cp ranks, exchanged behind the adapter. FSDP splits
# the B of packed rows along r, evenly or not at all.
_MIXER = _fields(
    r=4,
    target_modules=("in_proj", "out_proj", "in_proj_qkv", "in_proj_z", "q_proj", "o_proj"),
)
MIXERS = {
    f"{family}_cp{cp}": (Case(family, cp=cp), _MIXER)
    for family in ("bamba", "qwen3_5")
    for cp in (1, 2)
}
FEATURES |= MIXERS
ALL = {**FEATURES, **GRID}
CELLS = [(2, "after", name) for name in ALL] + [(2, "before", n) for n in (*BEFORE, *MIXERS)]
# More ranks than heads, uneven shards.
CELLS += [(4, "after", "embedding_and_head")]
FOUR = {
    "kv2": (Case("llama_kv2"), ()),
    "kv1_dora": (Case("llama_kv1"), _fields(use_dora=True)),
    "kv1_dropout": (Case("llama_kv1"), _fields(lora_dropout=0.3)),
}
# Two groups of two ranks, with batches of their own.
_HYBRID = (("dp_shard", None), ("dp_replicate", 2))
GROUPS = {
    "groups": (Case("qwen3", accum=3, data=2), ()),
    "groups_dora": (Case("llama_bias", seed=1, data=2), _fields(use_dora=True)),
    "groups_checkpointed": (Case("llama", True, "float64", "non_reentrant", data=2), ()),
    "replicas": (Case("llama", data=2, parallelize=_HYBRID), ()),
    "groups_moe": (Case("qwen2_moe", data=2), SPARSE),
    "groups_moe_ep": (Case("qwen2_moe", data=2, parallelize=(("ep", 4),)), SPARSE),
}
# Outside of the blocks, FSDP has to be told of them.
GROUPS_BEFORE = {
    "groups_ends": (Case("llama", data=2), FEATURES["embedding_and_head"][1]),
    "groups_saved": (Case("qwen3", data=2), FEATURES["modules_to_save"][1]),
}
ALL |= FOUR | GROUPS | GROUPS_BEFORE
CELLS += [(4, "after", n) for n in (*FOUR, *GROUPS)]
CELLS += [(4, "before", n) for n in (*GROUPS, *GROUPS_BEFORE)]


def _lora(name, order):
    case, fields = ALL[name]
    return Lora(case, order, fields)


def _mark(tp, order, name):
    slow = (tp, order) != (2, "after")
    return pytest.param(tp, order, name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("tp", "order", "name"), [_mark(*cell) for cell in CELLS])
def test_training_matches_the_unsharded_model(tp, order, name):
    mine = [n for t, o, n in CELLS if (t, o) == (tp, order)]
    cases = tuple(_lora(n, order) for n in mine)
    per_rank = run_once(tp, jobs.train_all, timeout=240, cases=cases)
    assert_parity([reports[mine.index(name)] for reports in per_rank])


@pytest.mark.parametrize("fields", [{}, {"init_lora_weights": "gaussian"}, {"use_dora": True}])
@pytest.mark.parametrize("seeds", ["alike", "own"])
def test_init_is_that_of_one_process(seeds, fields):
    first, *others = pool(2).run(jobs.initial, seeds=seeds, fields=fields)
    for found in (first, *others):
        assert found["replicas"]
        assert found["shards_differ"]
    # Own seeds: all ranks have the first rank's, which is the one process's.
    assert all(found["equal"] for found in (first, *others))


@pytest.mark.parametrize("order", ORDERS)
def test_lifecycle(order, tmp_path):
    assert_parity(pool(2).run(jobs.lifecycle, order=order, directory=str(tmp_path / "adapter")))


def test_transformers_own_adapter_methods(tmp_path):
    assert_parity(pool(2).run(jobs.native, directory=str(tmp_path / "adapter")))


@pytest.mark.parametrize(
    ("base_dtype", "autocast", "upcast"),
    [("bfloat16", False, True), ("bfloat16", False, False), ("float32", True, True)],
)
def test_low_precision_is_no_noisier(base_dtype, autocast, upcast):
    """The bound of tests/parity/test_low_precision.py, and its reasons; bfloat16 rounds to 2^-9."""
    kwargs = {"base_dtype": base_dtype, "autocast": autocast, "upcast": upcast}
    for found in pool(2).run(jobs.noise, **kwargs):
        assert 1e-3 < found["unsharded"] < 0.3, f"the yardstick itself is off: {found}"
        assert found["parallel"] <= 1.5 * found["unsharded"], found


AFTER = [
    ({"init_lora_weights": "pissa"}, "needs the whole base weights"),
    ({"init_lora_weights": "olora"}, "parallelize second"),
    ({"lora_bias": True}, "lora_bias"),
    ({"use_dora": True, "lora_dropout": 0.1}, "runs the base layer a second time"),
    ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication"),
    ({"modules_to_save": ["mlp"]}, "module with children"),
    ({"low_cpu_mem_usage": True}, "low_cpu_mem_usage"),
    ({"use_dora": True, "target_modules": ["lm_head"]}, "DoRA on the embedding or the head"),
    ({"use_bdlora": True}, "use_bdlora"),
    ({"family": "mixtral", "target_modules": "all-linear"}, "LoRA on experts"),
    ({"family": "mixtral", "target_modules": ["q_proj", "w1", "w2", "w3"]}, "LoRA on experts"),
    (
        {"family": "qwen3_moe", "target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"]},
        "router or experts",
    ),
]


@pytest.mark.parametrize(("fields", "part"), AFTER, ids=lambda x: str(x)[:40])
def test_refused_after_parallelize(fields, part):
    if "use_bdlora" in fields:
        fields = {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}}
    for message, untouched in pool(2).run(jobs.refuse_after, fields=fields):
        assert message is not None
        assert message.startswith("ConfigError")
        assert part in message
        assert untouched


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("IA3Config", {"target_modules": ["k_proj"], "feedforward_modules": []}),
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
        ("AdaLoraConfig", {"total_step": 10}),
    ],
)
@pytest.mark.parametrize("job", [jobs.refuse_after, jobs.refuse_before])
def test_other_methods_are_refused(kind, fields, job):
    for message, untouched in pool(2).run(job, fields=fields, kind=kind):
        assert message is not None
        assert "is not supported for a parallelized model" in message
        assert untouched


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
        ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, "module with children"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "DoRA"),
    ],
    ids=str,
)
def test_refused_before_parallelize(fields, part):
    for message, untouched in pool(2).run(jobs.refuse_before, fields=fields):
        assert message is not None
        assert part in message
        assert untouched


def test_methods_that_are_refused(tmp_path):
    parts = ("add_weighted_adapter", "convert in one process", "adapter_names", "hotswap_adapter")
    for messages in pool(2).run(jobs.refuse_methods, directory=str(tmp_path)):
        for message, part in zip(messages, parts, strict=True):
            assert message is not None
            assert part in message


def test_tensors_of_a_shards_shape_are_refused(tmp_path):
    for message, untouched in pool(2).run(jobs.misfit, directory=str(tmp_path)):
        assert message is not None
        assert message.startswith("CheckpointError")
        assert untouched
