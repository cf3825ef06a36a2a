"""Mutants of what context parallel ranks exchange, and of how their gradients are summed."""

from __future__ import annotations

from dataclasses import replace

import torch
from harness.parity import Case

from hf_sp import api
from hf_sp.comm import parts as cuts
from hf_sp.context import attention, ulysses
from hf_sp.model import head
from hf_sp.moe import router
from mutants.registry import Patch, mutant
from mutants.wrongly import backward, scaled

DENSE = Case("llama_kv1", cp=2)
SPARSE = Case("mixtral", cp=2)


@mutant(DENSE)
def heads_and_tokens_stay_where_they_are() -> list[Patch]:
    return [(ulysses.comm, "all_to_all", lambda x, receive, send, axis: x)]


@mutant(DENSE)
def heads_of_another_rank_attend() -> list[Patch]:
    def rolled(x, *how):
        return ulysses.comm.wait(ulysses.comm.launch_all_to_all(x, *how)).roll(x.shape[0] // 2, 0)

    return [(ulysses.comm, "all_to_all", rolled)]


@mutant(DENSE)
def gradients_of_heads_do_not_come_back() -> list[Patch]:
    def own(ctx, *grads):
        P, cp = ctx.length, ctx.axis.size
        grads = [torch.nn.functional.pad(g, (0, 0, 0, P * cp - g.shape[2])) for g in grads]
        return None, None, *(g[:, :, :P].repeat(1, cp, 1, 1) for g in grads)

    return [backward(ulysses._ToHeads, own)]


@mutant(DENSE)
def gradients_of_the_output_do_not_come_back() -> list[Patch]:
    def own(ctx, grad):
        S, axis = ctx.length, ctx.axis
        mine = grad.chunk(axis.size, 2)[axis.rank]
        return mine.repeat(1, axis.size, 1, 1)[:, :S].contiguous(), None, None

    return [backward(ulysses._ToSequence, own)]


@mutant(DENSE)
def positions_of_the_first_part() -> list[Patch]:
    original = attention.ContextConfig.own

    def first(self, kwargs, length, parts):
        return original(self, kwargs, length, _of_the_first(parts))

    return [(attention.ContextConfig, "own", first)]


def _of_the_first(parts: cuts.Parts) -> cuts.Parts:
    return replace(parts, axis=replace(parts.axis, rank=0))


@mutant(DENSE)
def a_head_that_travels_twice_is_trained_half() -> list[Patch]:
    original = attention.to_heads

    def halved(q, k, v, *how):
        return original(q, scaled(0.5).apply(k), scaled(0.5).apply(v), *how)

    return [(attention, "to_heads", halved)]


@mutant(DENSE)
def the_entrys_gradient_is_cp_times_too_large() -> list[Patch]:
    original = cuts._TakeGather.backward

    def larger(ctx, grad):
        return original(ctx, grad)[0] * ctx.parts.axis.size, None, None

    return [backward(cuts._TakeGather, larger)]


@mutant(DENSE)
def a_loss_of_own_tokens() -> list[Patch]:
    return [(head, "sum_times", lambda x, parts: x)]


@mutant(DENSE)
def gradients_are_the_mean_of_the_parts() -> list[Patch]:
    return [backward(cuts._SumTimes, lambda ctx, grad: (grad, None))]


@mutant(DENSE)
def labels_of_the_first_part() -> list[Patch]:
    original = cuts.Parts.take

    def take(self, x, dim, fill=0):
        return original(self if fill == 0 else _of_the_first(self), x, dim, fill)

    return [(cuts.Parts, "take", take)]


@mutant(DENSE)
def ranks_of_a_group_train_for_themselves() -> list[Patch]:
    return [(api, "shard_over_data", lambda *args: None)]


@mutant(SPARSE)
def router_logits_of_a_part_are_averaged() -> list[Patch]:
    def averaged(x, S, parts):
        return scaled(1 / parts.axis.size).apply(cuts.gather_take(x, S, parts))

    return [(router, "gather_take", averaged)]
