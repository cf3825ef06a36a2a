"""Mutants of mixers: their padding masks, and what context parallel ranks exchange of them."""

from __future__ import annotations

from unittest import mock

import torch
from harness.parity import Case

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.context import mixer as heads
from hf_sp.model import mixer, mixer_groups, mixer_input
from mutants.registry import Patch, mutant
from mutants.wrongly import backward

PADDED = Case("bamba")
CUT = Case("bamba", cp=2)
# One group for all heads.
_ONE = (("mamba_n_groups", 1),)
SHARED, CUT_SHARED = Case("bamba", model_kwargs=_ONE), Case("bamba", cp=2, model_kwargs=_ONE)


@mutant(PADDED)
def padding_runs_through_the_scan() -> list[Patch]:
    return [(mixer_input, "_masked", lambda x, mask, parts, tp: x)]


@mutant(PADDED)
def masks_are_of_the_next_ranks_tokens() -> list[Patch]:
    right = mixer_input._masked
    return [(mixer_input, "_masked", lambda x, mask, *where: right(x, mask.roll(9, 1), *where))]


@mutant(PADDED)
def padding_has_a_gradient() -> list[Patch]:
    return [backward(mixer_input._Masked, lambda ctx, grad: (grad, None, None, None))]


@mutant(PADDED)
def what_is_made_again_is_not_masked() -> list[Patch]:
    return [(mixer_input, "_masked_again", lambda function, where, *inputs: function(*inputs[:-1]))]


@mutant(PADDED)
def padding_comes_out_of_the_convolution() -> list[Patch]:
    return [(mixer_input.AppliedMask, "__rmul__", lambda self, x: x)]


@mutant(Case("falcon_h1"))
def what_is_made_again_is_not_multiplied() -> list[Patch]:
    return [(mixer_input, "_times", lambda function, factor, *inputs: function(*inputs))]


@mutant(CUT)
def tokens_and_heads_stay_where_they_are() -> list[Patch]:
    wrong = mock.Mock(wraps=comm)
    wrong.all_to_all = lambda x, receive, send, axis: x
    return [(heads, "comm", wrong)]


@mutant(CUT)
def heads_of_mixers_are_another_ranks() -> list[Patch]:
    wrong = mock.Mock(wraps=comm)
    wrong.all_to_all = lambda x, *how: comm.all_to_all(x, *how).roll(x.shape[0] // 2, 0)
    return [(heads, "comm", wrong)]


@mutant(CUT)
def what_is_packed_is_exchanged_as_one() -> list[Patch]:
    def as_one(function):
        def exchange(made, sizes, *how):
            cp = how[-1].axis.size
            one = [((cp, sum(n * width for n, width in own) // cp),) for own in sizes]
            return function(made, one, *how)

        return exchange

    return [(heads, name, as_one(getattr(heads, name))) for name in ("_spread", "_collect")]


@mutant(CUT)
def own_rows_are_those_of_the_first_part() -> list[Patch]:
    def first(state):
        cp = state.cut.axis.size
        return state.tp * cp, state.rank * cp

    return [(mixer, "place", first)]


@mutant(CUT)
def gradients_of_a_mixers_heads_do_not_come_back() -> list[Patch]:
    right = heads._ToHeads.backward

    def own(ctx, *grads):
        P, rank = ctx.parts.length(grads[0].shape[1]), ctx.parts.axis.rank
        mine = torch.zeros(grads[0].shape[1], 1)
        mine[rank * P : (rank + 1) * P] = 1
        return right(ctx, *(g * mine for g in grads))

    return [backward(heads._ToHeads, own)]


@mutant(SHARED)
def gradients_of_shared_groups_are_own_heads() -> list[Patch]:
    wrong = mock.Mock(wraps=pairs)
    wrong.allgather_reducescatter = pairs.allgather_scatter
    return [(mixer_groups, "pairs", wrong)]


@mutant(SHARED)
def gated_norms_see_own_features() -> list[Patch]:
    wrong = mock.Mock(wraps=pairs)
    wrong.allreduce_identity = lambda x, axis: x * axis.size
    return [(mixer_groups, "pairs", wrong)]


@mutant(SHARED)
def sums_of_gated_norms_have_own_gradients() -> list[Patch]:
    wrong = mock.Mock(wraps=pairs)
    wrong.identity_allreduce = lambda x, axis: x
    return [(mixer_groups, "pairs", wrong)]


@mutant(CUT_SHARED)
def gradients_of_what_went_to_several_are_the_first_ones() -> list[Patch]:
    def first(x, n, cp):
        return (x if n >= cp else x.unflatten(-2, (n, cp // n)).select(-2, 0)).flatten(-2)

    return [(heads, "_of_ranks", first)]
