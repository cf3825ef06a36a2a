"""Mutants of what mixture-of-experts layers add."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from harness.parity import Case
from torch.distributed.tensor import Shard

from hf_sp import install
from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.model import columns
from hf_sp.model import shard as swap
from hf_sp.model.local import local
from hf_sp.moe import block as sparse
from hf_sp.moe import experts, router
from hf_sp.moe.dispatcher import Dispatcher
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
    right = router.leave_router_logits
    scaled = wrongly.scaled(2.0)

    def leave(logits, *rest):
        return tuple(scaled.apply(x) for x in right(logits, *rest))

    return [(install, "leave_router_logits", leave)]


@mutant(Case("qwen3_moe", parallelize=TRAVEL))
def auxiliary_loss_of_travelling_tokens_without_gradient() -> list[Patch]:
    right = router.leave_router_logits

    def leave(logits, *rest):
        return right(tuple(x.detach() for x in logits), *rest)

    return [(install, "leave_router_logits", leave)]


# --- router and gates ---------------------------------------------------------------------------


def _router_not_summed() -> list[Patch]:
    def node_parameters(self, like):
        return local(self.module._parameters["weight"]), None

    return [(router.RouterParameters, "node_parameters", node_parameters)]


@mutant(Case("mixtral"))
def router_gradient_is_not_summed() -> list[Patch]:
    return _router_not_summed()


@mutant(Case("mixtral", parallelize=TRAVEL))
def router_gradient_of_travelling_tokens_is_not_summed() -> list[Patch]:
    return [(router.RouterParameters, "summed", lambda self: False)]


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

    return [(experts, "experts_backward", wrong)]


@mutant(Case("qwen2_moe"))
def experts_send_the_router_no_gradient() -> list[Patch]:
    return _router_unmoved_by_experts()


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def travelled_experts_send_the_router_no_gradient() -> list[Patch]:
    return _router_unmoved_by_experts()


# --- experts ------------------------------------------------------------------------------------


@mutant(Case("mixtral"))
def packed_weight_is_split_as_one() -> list[Patch]:
    return [(swap, "packed_shard", lambda dim: Shard(dim))]


@mutant(Case("mixtral"))
def packed_halves_are_swapped() -> list[Patch]:
    right = experts.swiglu_forward
    return [(experts, "swiglu_forward", lambda gate, up, **kw: right(up, gate, **kw))]


def _expert_gradient_scaled() -> list[Patch]:
    """Of gate_up: the entry makes it where the block's tokens are gathered, else the experts do."""
    right = experts.grouped_weight_gradient
    width = 64  # the tokens', and not the features'

    def wrong(dy, x, groups):
        return right(dy, x, groups) * (2 if x.shape[1] == width else 1)

    return [(experts, "grouped_weight_gradient", wrong)]


@mutant(Case("qwen3_moe"))
def expert_gradient_is_scaled() -> list[Patch]:
    return _expert_gradient_scaled()


@mutant(Case("qwen3_moe", parallelize=TRAVEL))
def travelled_expert_gradient_is_scaled() -> list[Patch]:
    return _expert_gradient_scaled()


def _gate_up_gradient(wrong: Any) -> list[Patch]:
    right = sparse.gate_up_gradient

    def gradient(*args, top_k, **kwargs):
        return right(*wrong(*args, top_k), top_k=top_k, **kwargs)

    return [(sparse, "gate_up_gradient", gradient)]


@mutant(Case("qwen3_moe"))
def expert_gradient_from_other_tokens() -> list[Patch]:
    return _gate_up_gradient(lambda dy, rows, ends, x, k: (dy, rows, ends, x.roll(1, 0)))


@mutant(Case("qwen3_moe"))
def expert_gradient_from_the_tokens_of_other_rows() -> list[Patch]:
    return _gate_up_gradient(lambda dy, rows, ends, x, k: (dy, rows.roll(1, 0), ends, x))


@mutant(Case("qwen3_moe"))
def expert_gradient_of_sequence_major_tokens() -> list[Patch]:
    def wrong(dy, rows, ends, x, k):
        return dy, rows, ends, x.view(2, -1, x.shape[1]).transpose(0, 1).reshape(x.shape)

    return _gate_up_gradient(wrong)


@mutant(Case("qwen3_moe"))
def expert_gradient_of_the_neighbours_rows() -> list[Patch]:
    def wrong(dy, rows, ends, x, k):
        return dy, rows, torch.cat([ends[1:], ends[-1:]]), x

    return _gate_up_gradient(wrong)


@mutant(Case("qwen3_moe"))
def places_of_rows_travel_as_bfloat16() -> list[Patch]:
    """As gradients they would be rounded: 17 bits of a place need float64's 53."""

    def wrong(dy, rows, ends, x, k):
        places = (rows + 2**10).bfloat16().long() - 2**10
        return dy, places.clamp(0, k * x.shape[0] - 1), ends, x

    return _gate_up_gradient(wrong)


@mutant(Case("mixtral"))
def experts_input_gradient_is_lost() -> list[Patch]:
    right = columns._input_gradient

    def wrong(ctx, dfull, *rest):
        return right(ctx, None if dfull is None else dfull * 0, *rest)

    return [(columns, "_input_gradient", wrong)]


@mutant(Case("mixtral"))
def down_gradient_without_the_routing_weight() -> list[Patch]:
    right = experts.experts_backward

    def wrong(dy, gate_up, scale, *rest):
        dgate_up, dscale, _ = right(dy, gate_up, scale, *rest)
        return dgate_up, dscale, right(dy, gate_up, torch.ones_like(scale), *rest)[2]

    return [(experts, "experts_backward", wrong)]


@mutant(Case("mixtral"))
def outputs_go_to_the_wrong_tokens() -> list[Patch]:
    right = Dispatcher.unpermute
    return [(Dispatcher, "unpermute", lambda self, y: right(self, y).roll(1, 0))]


# --- on the way ---------------------------------------------------------------------------------


@mutant(Case("mixtral", parallelize=TRAVEL))
def tokens_meet_the_wrong_expert() -> list[Patch]:
    right = Dispatcher.all_to_all.__func__

    def all_to_all(cls, *args):
        dispatcher = right(cls, *args)
        dispatcher.places = dispatcher.places.flip(0)
        return dispatcher

    return [(Dispatcher, "all_to_all", classmethod(all_to_all))]


@mutant(Case("mixtral", parallelize=TRAVEL))
def results_come_back_in_another_order() -> list[Patch]:
    right = Dispatcher.launch_combine
    return [(Dispatcher, "launch_combine", lambda self, rows: right(self, rows).flip(0))]


@mutant(Case("mixtral", parallelize=TRAVEL))
def routing_weights_of_other_tokens() -> list[Patch]:
    right = Dispatcher.land_dispatch

    def land_dispatch(self, launched):
        arrived = right(self, launched)
        return arrived.roll(1, 0) if arrived.dim() == 1 else arrived

    return [(Dispatcher, "land_dispatch", land_dispatch)]


@mutant(Case("mixtral", parallelize=TRAVEL))
def input_gradient_of_travelled_rows_is_lost() -> list[Patch]:
    right = experts._Experts.backward

    def backward(ctx, grad):
        *none, dx, dscale, dw, ddown, _, _, _ = right(ctx, grad)
        return *none, dx * 0, dscale, dw, ddown, None, None, None

    return [wrongly.backward(experts._Experts, backward)]


@mutant(Case("mixtral", parallelize=TRAVEL))
def tokens_made_again_are_others() -> list[Patch]:
    right = experts.restored
    return [(experts, "restored", lambda *args: right(*args).roll(1, 0))]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def real_tokens_stay_at_home() -> list[Patch]:
    right = Dispatcher.all_to_all.__func__

    def all_to_all(cls, index, local, axis):
        index = index.clone()
        index[0] = local * axis.size
        return right(cls, index, local, axis)

    return [(Dispatcher, "all_to_all", classmethod(all_to_all))]


# --- the shared expert --------------------------------------------------------------------------


def _tokens_made_again_are_rolled(dims: int) -> list[Patch]:
    right = sparse._reshaped

    def wrong(*inputs, function, shape):
        x = right(*inputs, function=function, shape=shape)
        return x.roll(1, -2) if len(shape) == dims else x

    return [(sparse, "_reshaped", wrong)]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def shared_expert_made_again_from_the_wrong_tokens() -> list[Patch]:
    return _tokens_made_again_are_rolled(dims=3)


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def router_s_tokens_made_again_are_others() -> list[Patch]:
    return _tokens_made_again_are_rolled(dims=2)


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def shared_expert_sees_its_own_tokens() -> list[Patch]:
    right = sparse.SharedBoundary.enter

    def gather(x, length, axis):
        return wrongly.own_copies(x.transpose(0, 1).contiguous(), axis)[:length].transpose(0, 1)

    def enter(self, *args):
        with mock.patch.object(comm, "gather_sequence", gather):
            return right(self, *args)

    return [(sparse.SharedBoundary, "enter", enter)]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def shared_expert_is_not_reduced() -> list[Patch]:
    right = sparse.SharedBoundary.leave

    def reduce_scatter(x, axis):
        return wrongly.own_part(x.transpose(0, 1), axis).transpose(0, 1)

    def leave(self, *args):
        with mock.patch.object(comm, "reduce_scatter_sequence", reduce_scatter):
            return right(self, *args)

    return [(sparse.SharedBoundary, "leave", leave)]


@mutant(Case("qwen2_moe", parallelize=TRAVEL))
def shared_expert_gets_the_gradient_of_its_own_tokens() -> list[Patch]:
    right = pairs._ReduceScatterAllGather.backward

    def backward(ctx, grad):
        x = wrongly.own_copies(grad.transpose(0, 1).contiguous(), ctx.axis)
        return x[: ctx.length].transpose(0, 1), None

    def either(ctx, grad):
        # A shared expert's output is [1, T, H]; the attention's, of two rows, is not.
        return (backward if grad.shape[0] == 1 else right)(ctx, grad)

    return [wrongly.backward(pairs._ReduceScatterAllGather, either)]
