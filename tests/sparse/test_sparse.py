"""Uses of mixture-of-experts models, and what they cost."""

from __future__ import annotations

import pytest
import refusals.jobs
import torch
from harness import tiny
from harness.parity import Case
from harness.pool import pool
from harness.report import assert_parity

from hf_sp.errors import PlanError
from hf_sp.plan import derive_plan
from hf_sp.plan.known_forms import check_sparse_blocks
from sparse import jobs

SPLITS = pytest.mark.parametrize("ep", [1, 2])


@SPLITS
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_inputs(family, ep):
    assert_parity(pool(2).run(jobs.inputs, family=family, ep=ep))


@pytest.mark.parametrize(
    ("ep", "kernels", "sp"), [(1, True, True), (2, True, True), (1, False, False)]
)
def test_checkpoints_inside_of_a_block(ep, kernels, sp):
    assert_parity(pool(2).run(jobs.recomputed, ep=ep, kernels=kernels, sp=sp))


@pytest.mark.parametrize("ep", [1, 4])
def test_inputs_on_four_ranks(ep):
    assert_parity(pool(4).run(jobs.inputs, family="qwen2_moe", ep=ep))


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (4, 1), (4, 4)])
def test_router_logits_of_the_user(tp, ep):
    """The auxiliary loss's coefficient means the same at every split and world size."""
    assert_parity(pool(tp).run(jobs.router_logits_alone, family="qwen3_moe", ep=ep))


@pytest.mark.parametrize(("ep", "expert"), [(1, 0), (2, 0), (2, 3), (2, 7)])
def test_skewed_router(ep, expert):
    """One expert gets every token (and the next one too); one rank may get none."""
    assert_parity(pool(2).run(jobs.skewed, ep=ep, expert=expert))


def test_skewed_router_on_four_ranks():
    assert_parity(pool(4).run(jobs.skewed, ep=4, expert=5))


@SPLITS
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_load(family, ep):
    for rank in pool(2).run(jobs.load, family=family, ep=ep):
        assert rank
        for found, wanted in rank:
            assert found == wanted
            assert sum(found) == 2 * 17 * 2


@pytest.mark.parametrize(("ep", "sp"), [(1, True), (2, True), (1, False)])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_generation(family, ep, sp):
    assert_parity(pool(2).run(jobs.generates, family=family, ep=ep, sp=sp))


@SPLITS
@pytest.mark.parametrize("checkpoint", [False, True])
def test_jitter(ep, checkpoint):
    assert_parity(pool(2).run(jobs.jitter, ep=ep, checkpoint=checkpoint))


@SPLITS
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_saving(family, ep, tmp_path):
    reports = pool(2).run(jobs.saves, family=family, ep=ep, folder=str(tmp_path))
    assert_parity(reports)


def test_optimizer_state_of_any_split(tmp_path):
    cases = tuple(Case("qwen2_moe", parallelize=(("ep", ep),)) for ep in (1, 2))
    reports = pool(2).run(jobs.optimizer_states, cases=cases, folder=str(tmp_path))
    assert_parity(reports, tol=0)


def test_copies():
    assert_parity(pool(2).run(jobs.copied))


def test_experts_implementation_of_the_user():
    assert_parity(pool(2).run(jobs.grouped_implementation, dtype="float32"))


# Every two of family, tp and how experts are split.
@pytest.mark.parametrize(
    ("family", "tp", "ep"),
    [("mixtral", 2, 1), ("mixtral", 4, 4), ("qwen2_moe", 2, 2), ("qwen2_moe", 4, 1)],
)
def test_bfloat16_gradients(family, tp, ep):
    """As test_low_precision, with the choice of experts held.

    Between two experts of nearly one probability, rounding chooses: any two bfloat16 models differ
    from float64 by whole experts then, by chance.
    """
    for found in pool(tp).run(jobs.rounding, family=family, ep=ep):
        assert 1e-3 < found["unsharded"] < 0.2, found
        assert found["parallel"] <= 1.5 * found["unsharded"], found


# --- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_each_token_travels_once_to_each_of_its_experts(tp, frozen):
    """A step sends 5 R rows of H numbers and 2 R scales, R = k tokens of this rank, and E counts.

    A token may be one that pads the sequence: at most tp - 1 for each of the batch, over all ranks.
    Without trained experts the rows need not travel again for their gradient: 4 R.
    """
    hidden, choices, tokens, experts = 64, 2, 37, 4
    ranks = pool(tp).run(jobs.traffic, frozen=frozen)
    # Each token of the batch of 2 is routed by one rank; the load does not count padding.
    assert sum(rank["rows"] for rank in ranks) == 2 * tokens * choices
    mine = 2 * -(-tokens // tp) * choices
    rows = [mine] * tp
    for rank in ranks:
        forward = [(shape, dtype, n) for shape, dtype, n, _ in rank["forward"]]
        assert forward[0] == ((experts,), torch.int64, experts)
        assert forward[1] == ((mine, hidden), torch.bfloat16, mine)
        assert forward[2][0] == (mine,)
        assert forward[3][0][1:] == (hidden,)
        assert len(forward) == 4
        assert len(rank["backward"]) == (3 if frozen else 4)
    sent = {
        phase: sum(n for rank in ranks for s, _, n, _ in rank[phase] if len(s) == 2)
        for phase in ("forward", "backward")
    }
    assert sent["forward"] == 2 * sum(rows)
    assert sent["backward"] == (2 if frozen else 3) * sum(rows)
    scales = sum(n for rank in ranks for s, _, n, _ in rank["forward"][1:] if len(s) == 1)
    assert scales == sum(rows)


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (4, 1), (4, 4)])
def test_bytes_alive(tp, ep):
    """What a sparse layer keeps, to the byte, counted on real ranks: routing depends on the data.

    Of the experts: gate and up of the rows, each row's scale and places, where experts end. Neither
    tokens that were picked or have travelled, nor products, nor outputs.
    """
    length, hidden, f, choices, experts = 64, 64, 48, 2, 8
    ranks = pool(tp).run(jobs.alive, ep=ep, length=length)
    for rank, found in enumerate(ranks):
        if ep == 1:
            rows = here = length * choices
            places, width, tokens = 4 * rows + 4 * experts, f // tp, length
        else:
            local, tokens, width = experts // tp, length // tp, f
            load = [sum(r["load"][e] for r in ranks) for e in range(experts)]
            rows, here = tokens * choices, sum(load[rank * local : (rank + 1) * local])
            places = 4 * (rows + here) + 4 * local
        kept = 2 * here * 2 * width + 2 * here + places
        # HF's router: float32 probabilities and the chosen places; ours: the counts of the load.
        router = tokens * (4 * experts + 8 * choices) + 8 * (experts + 1)
        # Heads of 16: q, k, v as projected, q and k rotated, the output; float32 statistics of
        # attention and of q's and k's norms.
        q, k = 8 // tp, 4 // tp
        attention = length * (2 * 16 * 3 * (q + k) + 8 * q + 4 * k)
        norms = length // tp * (4 * hidden + 8)
        assert found["bytes"] == kept + router + attention + norms


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kwargs", "parts"),
    [
        ("llama", {"ep": 2}, ["no layer has experts", "ep = 1"]),
        ("mixtral", {"ep": 4}, ["ep=4, tp=2", "ep = 1, 2"]),
        ("mixtral", {"ep": 2, "sp": False}, ["sp=False", "would send each tp times"]),
        ("mixtral", {"ep": 0}, ["ep must be a positive integer"]),
        ("mixtral", {"per_rank": {1: {"ep": 2}}}, ["asked for different things"]),
        (
            "mixtral",
            {"plan": {"model.layers.*.mlp.experts.gate_up_proj": "rowwise"}},
            ["mlp.experts.gate_up_proj: rowwise", "packed_colwise"],
        ),
    ],
    ids=str,
)
def test_refusals(family, kwargs, parts):
    for message, untouched in pool(2).run(refusals.jobs.refuse, family=family, **kwargs):
        assert untouched
        assert message is not None
        assert all(part in message for part in parts), message


def test_print_of_sizes_that_do_not_divide():
    model = tiny.build("qwen2_moe", moe_intermediate_size=36, shared_expert_intermediate_size=36)
    with pytest.raises(PlanError, match=r"expert features=36, 36 % 8 = 4"):
        derive_plan(model, 8, True)
    model = tiny.build("mixtral", num_local_experts=6)
    with pytest.raises(PlanError, match=r"experts=6, 6 % 4 = 2"):
        derive_plan(model, 4, True, ep=4)


@SPLITS
@pytest.mark.parametrize("targets", [("q_proj", "o_proj"), ("up_proj", "shared_expert_gate")])
def test_lora(ep, targets):
    """Adapters on attention; on the shared expert and its gate."""
    assert_parity(pool(2).run(jobs.adapters, ep=ep, targets=targets))


@pytest.mark.parametrize("change", ["activation", "residual", "router over tokens", "scaled twice"])
def test_blocks_of_another_form(change):
    """A block that only looks like one that is known."""
    model = tiny.build("mixtral")
    block = model.model.layers[1].mlp
    mixed = type(block)

    if change == "activation":
        block.experts.act_fn = torch.nn.GELU()
    elif change == "residual":

        class Residual(mixed):
            def forward(self, x):
                return x + super().forward(x)

        block.__class__ = Residual
    elif change == "scaled twice":

        class Squared(mixed):
            def forward(self, x):
                return super().forward(x).square()

        block.__class__ = Squared
    else:

        class Balanced(type(block.gate)):
            def forward(self, x):
                logits = torch.nn.functional.linear(x, self.weight)
                weights, index = (logits.softmax(0) * logits.softmax(1)).topk(self.top_k)
                return logits, weights, index

        block.gate.__class__ = Balanced
        del block.gate.forward
    plan = derive_plan(model, 2, True)
    with pytest.raises(PlanError, match=r"layers\.1\.mlp"):
        check_sparse_blocks(model, plan)


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_hooks_on_a_blocks_input(family, ep):
    reports = pool(2).run(jobs.foreign_hands, family=family, ep=ep)
    assert_parity([one for several in reports for one in several])
