"""Uses of models with data parallel ranks beside tp, what they cost, and what is refused."""

from __future__ import annotations

import pytest
import sparse.jobs
import torch
from harness.parity import Case
from harness.pool import pool
from harness.report import assert_parity

from data_parallel import jobs
from scripts.bench._cost.experts import (
    ExpertsShape,
    experts_weight_bytes,
    fsdp_experts_moved,
    travelling_experts_moved_per_token,
)

pytestmark = pytest.mark.slow

LLAMA = Case("llama", data=2)
SPREAD = Case("qwen2_moe", data=2, parallelize=(("ep", 4),))
CASES = pytest.mark.parametrize("case", [LLAMA, SPREAD], ids=str)


@CASES
def test_inputs(case):
    assert_parity(pool(4).run(jobs.inputs, case=case))


@CASES
def test_between_steps(case):
    assert_parity(pool(4).run(jobs.between_steps, case=case))


def test_a_vocabulary_that_no_degree_divides():
    case = Case("llama", data=2, model_kwargs=(("vocab_size", 97),))
    assert_parity(pool(4).run(jobs.outputs, case=case))


@CASES
def test_accumulation_without_sync(case):
    assert_parity(pool(4).run(jobs.accumulates, case=case))


@CASES
def test_outputs(case):
    assert_parity(pool(4).run(jobs.outputs, case=case))


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_generation(ep):
    options = (("ep", ep),) if ep > 1 else ()
    case = Case("qwen2_moe", data=2, dtype="float32", parallelize=options)
    assert_parity(pool(4).run(jobs.generates, case=case))


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_saving(ep, tmp_path):
    case = Case("qwen2_moe", data=2, parallelize=(("ep", ep),))
    assert_parity(pool(4).run(jobs.saves, case=case, folder=str(tmp_path)))


def test_optimizer_state_of_any_split(tmp_path):
    plain = Case("qwen2_moe")
    ways = [{"ep": 1}, {"ep": 2}, {"ep": 4}]
    cases = tuple(Case("qwen2_moe", data=2, parallelize=tuple(way.items())) for way in ways)
    reports = pool(4).run(sparse.jobs.optimizer_states, cases=(plain, *cases), folder=str(tmp_path))
    assert_parity(reports, tol=0)


@pytest.mark.parametrize(("ep", "total"), [(1, 2), (2, 2), (4, 4)])
def test_load_of_one_token(ep, total):
    """Of one sequence of one token, or of both groups': each counts for its two experts."""
    case = Case("mixtral", data=2, parallelize=(("ep", ep),))
    for layers in pool(4).run(jobs.single_token_load, case=case):
        assert layers == [total, total]


def test_groups_drop_other_places():
    for losses in pool(4).run(jobs.dropped):
        assert losses[0] == losses[1]
        assert losses[2] == losses[3]
        assert abs(losses[0] - losses[2]) > 1e-3


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_load(ep):
    """Of this group's batch, or of all batches where experts have the tokens of all."""
    case = Case("mixtral", data=2, parallelize=(("ep", ep),))
    for rank in pool(4).run(jobs.load, case=case):
        one, other = rank["wanted"]
        total = [
            [a + b for a, b in zip(x, y, strict=True)] for x, y in zip(one, other, strict=True)
        ]
        assert rank["found"] == (total if ep == 4 else rank["wanted"][rank["group"]])


def test_weights_of_the_first_rank():
    assert_parity(pool(4).run(jobs.other_weights))


@pytest.mark.parametrize(
    ("shape", "names", "ep"),
    [
        ((2, 2), ("dp_shard", "tp"), 4),
        ((2, 1, 2), ("dp_replicate", "dp_shard", "tp"), 2),
        ((1, 2, 2), ("dp_replicate", "dp_shard", "tp"), 4),
        ((1, 2, 2), ("pp", "dp_shard", "tp"), 4),
    ],
)
def test_mesh_of_the_user(shape, names, ep):
    reports = pool(4).run(jobs.user_mesh, shape=shape, names=names, ep=ep)
    assert_parity(reports)


def test_replicas_stay_equal():
    case = Case("llama", data=2, parallelize=(("dp_shard", None), ("dp_replicate", 2)))
    assert_parity(pool(4).run(jobs.replicas, case=case))


# --- what it costs ------------------------------------------------------------------------------


def test_each_token_travels_once_to_each_of_its_experts():
    """As over tp alone: 5 R rows a step, R = k tokens of this rank, to ep = 4 ranks of 2 groups."""
    hidden, choices, tokens = 64, 2, 37
    case = Case(
        "mixtral",
        data=2,
        dtype="bfloat16",
        parallelize=(("ep", 4),),
        model_kwargs=(("num_hidden_layers", 1),),
    )
    ranks = pool(4).run(jobs.traffic, case=case)
    rows = [rank["rows"] for rank in ranks]
    # The batch of 2 of each of 2 groups, each token routed by one rank.
    assert sum(rows) == 2 * 2 * tokens * choices
    # The row that makes the length a multiple of tp travels too, as zeros.
    travelling = 38
    for phase, times in (("forward", 2), ("backward", 3)):
        sent = sum(n for rank in ranks for shape, _, n, _ in rank[phase] if shape[1:] == (hidden,))
        assert sent == times * 2 * 2 * travelling * choices
    for rank in ranks:
        assert len(rank["forward"]) == len(rank["backward"]) == 4
    # The formula, of what leaves a rank for others, with what stays at home added.
    sent = sum(
        dtype.itemsize * shape.numel()
        for rank in ranks
        for phase in ("forward", "backward")
        for shape, dtype, *_ in rank[phase]
        if dtype != torch.int64
    )
    # Mixtral's router leaves its weights in float32.
    shape = ExpertsShape(hidden, 96, experts=4, choices=choices, routing_weight=4)
    assert sent == 4 * 2 * travelling * travelling_experts_moved_per_token(shape, 2, 4) * 4 / 3


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_weights_sent(ep):
    """A layer's weights go out twice and its gradients once; experts over all ranks never do."""
    case = Case("mixtral", data=2, dtype="bfloat16", parallelize=(("ep", ep),))
    shape = ExpertsShape(hidden=64, intermediate=96, experts=4, choices=2)
    for rank in pool(4).run(jobs.weights_sent, case=case):
        more = {}
        for phase, one, two in zip(("forward", "backward"), rank["one"], rank["two"], strict=True):
            for kind in ("_allgather_base_", "_reduce_scatter_base_"):
                sizes = [[size for name, size in calls if name == kind] for calls in (one, two)]
                more[phase, kind] = (len(sizes[1]) - len(sizes[0]), sum(sizes[1]) - sum(sizes[0]))
        experts = sum(size for name, size in rank["sizes"].items() if "experts" in name)
        held = sum(rank["sizes"].values()) - (experts if ep == 4 else 0)
        assert more["forward", "_allgather_base_"] == (1, held)
        assert more["backward", "_allgather_base_"] == (1, held)
        assert more["backward", "_reduce_scatter_base_"] == (1, 2 * held)
        assert more["forward", "_reduce_scatter_base_"] == (0, 0)
        assert experts == experts_weight_bytes(shape) / 4
        if ep < 4:
            # Of two ranks' parts of the gradient the own one stays.
            assert fsdp_experts_moved(shape, 2, 2) == 2 * experts + 2 * experts / 2


def test_bytes_alive():
    """FSDP keeps no activation: a layer saves the same bytes, and stores half the weights."""
    (alone, stored), *_ = pool(2).run(jobs.alive, case=Case("llama"))
    for kept, part in pool(4).run(jobs.alive, case=LLAMA):
        assert kept == alone
        assert part == stored // 2


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("gradient", "gradients of its whole parameters"),
        ("options", "asked for different things"),
        ("layers", "asked for different things"),
    ],
)
def test_ranks_that_differ_refuse_together(kind, part):
    for message, untouched in pool(4).run(jobs.ranks_differ, kind=kind):
        assert untouched
        assert message is not None
        assert part in message


@pytest.mark.parametrize(
    ("kind", "part"), [("batch", "tp rank 1 of group 1"), ("kinds", "inputs of different kinds")]
)
def test_batches_that_differ_are_refused_on_all_ranks(kind, part):
    answers = pool(4).run(jobs.batch_differs, kind=kind)
    for message, _ in answers:
        assert message is not None
        assert part in message
    assert_parity([report for _, report in answers])


def test_what_is_not_built():
    late = "cannot be added to a model with data or context parallel ranks"
    packed = "a packed linear cannot be sharded over data parallel ranks"
    parts = {
        "packed, adapters first": packed,
        "packed, adapters second": packed,
        "head adapter": f"an adapter outside of the attention and MLP blocks {late}",
        "modules_to_save": f"modules_to_save {late}",
        "second adapter": f"a second adapter {late}",
        "merge": "adapters cannot be merged into a model with data parallel ranks",
        "a module alone": "called outside the model's forward",
        "a layer alone": "called by itself",
        "dtypes": "trained weights of one FSDP group have different dtypes",
    }
    for found in pool(4).run(jobs.refusals):
        assert not found.pop("touched")
        assert found.pop("an even rank") is None
        assert found.keys() == parts.keys()
        for name, part in parts.items():
            assert found[name] is not None, name
            assert part in found[name], found[name]


AXES = ("dp_replicate", "dp_shard", "tp")
_TWO = ["ep=4 cannot be used", "experts=2, 2 % 4 = 2", "legal:  ep = 1, 2"]


@pytest.mark.parametrize(
    ("family", "kwargs", "parts"),
    [
        ("llama", {"tp": 2}, ["tp=2 does not make up the world", "tp=4, or dp_shard=2"]),
        ("llama", {"tp": 2, "dp_shard": 3}, ["dp_shard=3, tp=2 do not", "legal:  dp_shard=2"]),
        ("llama", {"dp_shard": 3}, ["dp_shard=3 does not", "legal:  dp_shard=1, 2, 4"]),
        ("llama", {"dp_replicate": 3}, ["dp_replicate=3 does not", "whose product divides"]),
        ("mixtral", {"tp": 2, "dp_shard": 2, "ep": 4, "fields": {"num_local_experts": 2}}, _TWO),
        ("llama", {"shape": (2, 1, 2), "names": ("dp_shard", "dp_replicate", "tp")}, ["in this"]),
        ("mixtral", {"shape": (1, 4), "names": ("tp", "dp_shard"), "ep": 4}, ["in this order"]),
        ("llama", {"dp_shard": 0}, ["dp_shard must be a positive integer"]),
        ("llama", {"dp_replicate": True}, ["dp_replicate must be a positive integer"]),
        ("mixtral", {"dp_shard": 4, "ep": 2}, ["ep=2, tp=1, dp_shard=4", "ep = 1, 4"]),
        ("mixtral", {"dp_replicate": 2, "ep": 4}, ["ep = 1, 2", "dp_replicate=1"]),
        ("mixtral", {"tp": 2, "dp_shard": 2, "ep": 4, "sp": False}, ["sp=False"]),
        ("mixtral", {"shape": (2, 2), "names": ("dp", "tp")}, ["dp_replicate, dp_shard, tp"]),
        ("llama", {"shape": (2, 2), "names": ("tp", "dp_shard")}, ["in this order"]),
        ("llama", {"shape": (2, 2), "names": ("dp_replicate", "tp")}, ["without dp_shard"]),
        (
            "llama",
            {"shape": (2, 2), "names": ("dp_shard", "tp"), "dp_shard": 4},
            ["dp_shard contradicts the mesh", "dp_shard=4", "of size 2"],
        ),
        (
            "llama",
            {"shape": (1, 2, 2), "names": AXES, "dp_replicate": 2},
            ["dp_replicate contradicts the mesh"],
        ),
    ],
    ids=str,
)
def test_degrees(family, kwargs, parts):
    for message, untouched in pool(4).run(jobs.refuse, family=family, **kwargs):
        assert untouched
        assert message is not None
        assert all(part in message for part in parts), message
