"""Mutants of what mixture-of-experts layers add."""

from __future__ import annotations

import torch
from harness.parity import Case
from torch.distributed.tensor import Shard

from hf_sp.comm import pairs
from hf_sp.model import forward
from hf_sp.model import shard as swap
from hf_sp.model.local import local
from hf_sp.moe import beside, experts, flat
from hf_sp.moe import block as sparse
from hf_sp.moe import dispatcher as dispatch
from mutants import wrongly
from mutants.registry import Patch, mutant

TRAVEL = (("ep", 2),)


# --- the auxiliary loss -------------------------------------------------------------------------


@mutant(Case("mixtral"))
def auxiliary_loss_counted_on_every_rank() -> list[Patch]:
    return [wrongly.backward(pairs._IdentityOneRank, lambda ctx, grad: (grad, None))]


@mutant(Case("qwen3_moe", sp=False))
def auxiliary_loss_counted_on_every_rank_without_sp() -> list[Patch]:
    return [wrongly.backward(pairs._IdentityOneRank, lambda ctx, grad: (grad, None))]


@mutant(Case("mixtral"))
def auxiliary_loss_averaged() -> list[Patch]:
    right = pairs._IdentityOneRank.backward

    def backward(ctx, grad):
        return right(ctx, grad)[0] / ctx.axis.size, None

    return [wrongly.backward(pairs._IdentityOneRank, backward)]


@mutant(Case("mixtral", parallelize=TRAVEL))
def auxiliary_loss_of_travelling_tokens_counted_on_every_rank() -> list[Patch]:
    right = sparse.leave_router_logits
    scaled = wrongly.scaled(2.0)

    def leave(logits, *rest):
        return tuple(scaled.apply(x) for x in right(logits, *rest))

    return [(forward, "leave_router_logits", leave)]


@mutant(Case("qwen3_moe", parallelize=TRAVEL))
def auxiliary_loss_of_travelling_tokens_without_gradient() -> list[Patch]:
    right = sparse.leave_router_logits

    def leave(logits, *rest):
        return right(tuple(x.detach() for x in logits), *rest)

    return [(forward, "leave_router_logits", leave)]


# --- router and gates ---------------------------------------------------------------------------


def _router_not_summed() -> list[Patch]:
    def local_parameters(self, like):
        return local(self.module._parameters["weight"]), None

    return [(sparse.RouterMember, "local_parameters", local_parameters)]


@mutant(Case("mixtral"))
def router_gradient_is_not_summed() -> list[Patch]:
    return _router_not_summed()


@mutant(Case("mixtral", parallelize=TRAVEL))
def router_gradient_of_travelling_tokens_is_not_summed() -> list[Patch]:
    return _router_not_summed()


@mutant(Case("qwen2_moe"))
def shared_gate_gradient_is_not_summed() -> list[Patch]:
    right = pairs.identity_allreduce
    return [
        (pairs, "identity_allreduce", lambda x, axis: x if x.shape == (1, 64) else right(x, axis))
    ]


def _router_unmoved_by_experts() -> list[Patch]:
    right = experts.experts_backward

    def wrong(*args):
        dgate_up, dscale, ddown = right(*args)
        return dgate_up, dscale * 0, ddown

    return [(experts, "experts_backward", wrong), (dispatch, "experts_backward", wrong)]


@mutant(Case("qwen2_moe"))
def experts_send_the_router_no_gradient() -> list[Patch]:
    return _router_unmoved_by_experts()


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def travelled_experts_send_the_router_no_gradient() -> list[Patch]:
    return _router_unmoved_by_experts()


# --- experts ------------------------------------------------------------------------------------


@mutant(Case("mixtral"))
def packed_weight_is_split_as_one() -> list[Patch]:
    return [(swap, "packed_halves", Shard)]


@mutant(Case("mixtral"))
def packed_halves_are_swapped() -> list[Patch]:
    right = experts.swiglu_forward
    return [(experts, "swiglu_forward", lambda gate, up, **kw: right(up, gate, **kw))]


def _expert_gradient_scaled() -> list[Patch]:
    right = experts.Place.leave

    def leave(self, dx, make):
        right(self, dx, lambda x: make(x) * 2)

    return [(experts.Place, "leave", leave)]


@mutant(Case("qwen3_moe"))
def expert_gradient_is_scaled() -> list[Patch]:
    return _expert_gradient_scaled()


@mutant(Case("qwen3_moe", parallelize=TRAVEL))
def travelled_expert_gradient_is_scaled() -> list[Patch]:
    return _expert_gradient_scaled()


@mutant(Case("qwen3_moe"))
def expert_gradient_from_other_tokens() -> list[Patch]:
    right = flat.FlatEntry.tokens
    return [(flat.FlatEntry, "tokens", lambda self, x: right(self, x).roll(1, 0))]


@mutant(Case("mixtral"))
def experts_input_gradient_is_lost() -> list[Patch]:
    right = flat.FlatEntry.receive_rows
    return [(flat.FlatEntry, "receive_rows", lambda self, dx: right(self, dx * 0))]


@mutant(Case("mixtral"))
def down_gradient_without_the_routing_weight() -> list[Patch]:
    right = experts.experts_backward

    def wrong(dy, gate_up, scale, *rest):
        dgate_up, dscale, _ = right(dy, gate_up, scale, *rest)
        return dgate_up, dscale, right(dy, gate_up, torch.ones_like(scale), *rest)[2]

    return [(experts, "experts_backward", wrong)]


@mutant(Case("mixtral"))
def outputs_go_to_the_wrong_tokens() -> list[Patch]:
    right = experts.Order.sum_choices
    return [(experts.Order, "sum_choices", lambda self, y: right(self, y).roll(1, 0))]


# --- on the way ---------------------------------------------------------------------------------


@mutant(Case("mixtral", parallelize=TRAVEL))
def tokens_meet_the_wrong_expert() -> list[Patch]:
    right = dispatch.Route.of.__func__

    def of(cls, *args):
        route = right(cls, *args)
        route.arrived = route.arrived.flip(0)
        return route

    return [(dispatch.Route, "of", classmethod(of))]


@mutant(Case("mixtral", parallelize=TRAVEL))
def results_come_back_in_another_order() -> list[Patch]:
    right = dispatch.Route.launch_back
    return [(dispatch.Route, "launch_back", lambda self, x, axis: right(self, x, axis).flip(0))]


@mutant(Case("mixtral", parallelize=TRAVEL))
def routing_weights_of_other_tokens() -> list[Patch]:
    right = dispatch.Route.land_there

    def land_there(self, launched):
        arrived = right(self, launched)
        return arrived.roll(1, 0) if arrived.dim() == 1 else arrived

    return [(dispatch.Route, "land_there", land_there)]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def shared_expert_made_again_from_the_wrong_tokens() -> list[Patch]:
    right = flat._flat
    return [(flat, "_flat", lambda x, dim: right(x, dim).roll(1, 0))]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def real_tokens_stay_at_home() -> list[Patch]:
    def keep(x, index, *rest):
        index = index.clone()
        index[0] = 8
        return index

    return [(sparse, "_real_tokens_only", keep)]


# --- meanwhile ----------------------------------------------------------------------------------


@mutant(Case("mixtral", parallelize=TRAVEL))
def input_gradient_on_its_way_is_left_out() -> list[Patch]:
    right = flat.FlatEntry.receive_later
    wrong = lambda self, land: right(self, lambda: land() * 0)  # noqa: E731
    return [(flat.FlatEntry, "receive_later", wrong)]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def gradient_of_a_late_shared_expert_is_lost() -> list[Patch]:
    right = beside._Depart.backward
    return [wrongly.backward(beside._Depart, lambda ctx, grad: (right(ctx, grad)[0] * 0, None))]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def late_shared_expert_is_not_reduced() -> list[Patch]:
    def forward(ctx, partial, crossing):
        ctx.crossing = crossing
        crossing.flying = wrongly.own_part(partial.transpose(0, 1), crossing.axis)
        return partial.new_empty(0)

    return [(beside._Depart, "forward", staticmethod(forward))]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def late_shared_expert_gets_the_gradient_of_its_own_tokens() -> list[Patch]:
    def launch(self):
        gradient, self.gradient = self.gradient, None
        if gradient is not None:
            self.flying = wrongly.own_copies(gradient, self.axis)

    return [(beside.Crossing, "launch", launch)]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def late_shared_expert_sees_its_own_tokens() -> list[Patch]:
    right = beside.EarlyEntry.gather

    def gather(self, x):
        right(self, x)
        self.gathered = wrongly.own_copies(x.transpose(0, 1), self.axis)
        return self.gathered.transpose(0, 1)

    return [(beside.EarlyEntry, "gather", gather)]
