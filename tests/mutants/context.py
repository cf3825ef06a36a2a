"""Mutants of what context parallel ranks exchange, and of how their gradients are summed."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import torch
from behaviour.inputs import touched_all
from harness.parity import Case

from hf_sp import api
from hf_sp.comm import parts as cuts
from hf_sp.context import attention, masks, ring, ulysses
from hf_sp.model import head
from hf_sp.moe import router
from mutants.registry import Patch, mutant
from mutants.wrongly import backward, scaled

DENSE = Case("llama_kv1", cp=2)
SPARSE = Case("mixtral", cp=2)
RING = Case("llama_kv1", cp=2, parallelize=(("cp_mode", "ring"),))
WINDOW = Case("mistral", cp=2, parallelize=(("cp_mode", "ring"),))
HYBRID = Case("llama_kv1", cp=4, parallelize=(("cp_mode", "hybrid"),))


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


@mutant(Case("gpt_oss", cp=2, attn="eager"))
def sinks_of_the_first_heads() -> list[Patch]:
    return [(attention, "_of_rank", lambda x, dim, own, axis: x.narrow(dim, 0, own))]


@mutant(DENSE, check=touched_all)
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


# --- around a ring ------------------------------------------------------------------------------


@mutant(RING)
def keys_stay_where_they_are() -> list[Patch]:
    def stay(x, receive, send, axis):
        return torch.cat([x, x.new_ones(sum(receive), *x.shape[1:])])[: sum(receive)]

    return [(ring.comm, "launch_all_to_all", stay)]


@mutant(HYBRID, tp=4)
def keys_of_the_wrong_place() -> list[Patch]:
    original = ring._unpacked
    return [(ring, "_unpacked", lambda rows, *like: original(rows.roll(len(rows) // 2, 0), *like))]


@mutant(RING)
def gradients_of_keys_are_not_returned() -> list[Patch]:
    original = ring._given_back

    def zeros(hop, axis, *grads):
        return original(hop, axis, *(torch.zeros_like(x) for x in grads))

    return [(ring, "_given_back", zeros)]


@mutant(RING)
def outputs_are_added_and_not_weighed() -> list[Patch]:
    def added(out, lse, more, its_lse):
        out.add_(more)
        lse.copy_(torch.logaddexp(lse, its_lse))

    return [(ring, "_merge", added)]


@mutant(RING)
def backward_knows_the_sum_of_its_own_keys_alone() -> list[Patch]:
    def alone(dout, q, k, v, out, lse, *how):
        lse = ring.attention(q, k, v, *how)[1]
        lse = lse.masked_fill(lse.isinf(), 0)
        return right(dout, q, k, v, out, lse, *how)

    right = ring.attention_backward
    return [(ring, "attention_backward", alone)]


@mutant(RING)
def labels_are_not_in_the_order_of_the_ring() -> list[Patch]:
    right, original = cuts.Parts.stretches, cuts.Parts.take

    def neighbours(self, S, place):
        size = self.length(S) * self.axis.size // (2 * self.ring)
        starts = 2 * place * size, (2 * place + 1) * size
        return [(start, min(max(S - start, 0), size)) for start in starts]

    def take(self, x, dim, fill=0):
        with mock.patch.object(cuts.Parts, "stretches", neighbours if fill else right):
            return original(self, x, dim, fill)

    return [(cuts.Parts, "take", take)]


@mutant(RING)
def a_pad_is_seen() -> list[Patch]:
    original = masks._ends

    def wider(real):
        first, last = original(real)
        return first - 1, last

    return [(masks, "_ends", wider)]


@mutant(WINDOW)
def a_window_is_one_too_long() -> list[Patch]:
    original = masks._joined

    def longer(all_of):
        found = original(all_of)
        return found._replace(before=found.before + 1)

    return [(masks, "_joined", longer)]
