"""Mutants of the embedding, the head and the loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from harness.parity import Case

from hf_sp.comm import pairs
from hf_sp.kernels import cross_entropy_steps as steps
from hf_sp.model import block, chunks, embedding, head, lazy, loss
from hf_sp.model.chunks import Chunks, HeadGradients
from mutants import wrongly
from mutants.registry import Patch, mutant


@mutant(Case("llama_bias", sp=False))
def embedding_is_not_summed() -> list[Patch]:
    right = pairs.allreduce_identity
    # Of the whole, for who touches it: here a model without sequence shards.
    return [(pairs, "allreduce_identity", lambda x, axis: right(x, axis) * 0 + x)]


@mutant(Case("llama_odd_vocab"))
def embedding_looks_up_ids_of_other_ranks() -> list[Patch]:
    return [(embedding, "vocab_range", lambda vocab, axis: (0, -(-vocab // axis.size)))]


@mutant()
def loss_uses_local_statistics() -> list[Patch]:
    return [(loss, "share", lambda stats, axis: torch.stack([stats] * axis.size))]


@mutant()
def loss_combines_sums_without_their_peaks() -> list[Patch]:
    right = loss.combine

    def wrong(stats, labels, terms):
        highest = stats[:, 0].amax(0).expand_as(stats[:, 0])
        return right(torch.cat([highest[:, None], stats[:, 1:]], 1), labels, terms)

    return [(loss, "combine", wrong)]


def _with_terms(**wrong: Any) -> list[Patch]:
    """The gradient of another loss than the one whose value is returned."""
    right = loss.write_gradient

    def write(logits, labels, whole, terms):
        return right(logits, labels, whole, dataclasses.replace(terms, **wrong))

    return [(loss, "write_gradient", write)]


@mutant(Case("granite"))
def loss_gradient_is_not_scaled() -> list[Patch]:
    return _with_terms(scale=1.0)


@mutant(Case("granite"))
def scale_of_the_logits_is_dropped() -> list[Patch]:
    return [(lazy.LazyLogits, "scale_and_softcap", lambda self: (1.0, None))]


@mutant(Case("llama_capped"))
def derivative_of_the_softcap_is_dropped() -> list[Patch]:
    right = steps._slab_gradient

    def wrong(x, labels, peak, total, dloss, terms):
        capped = steps._mapped(x, terms)
        plain = dataclasses.replace(terms, softcap=None, scale=1.0)
        return right(capped, labels, peak, total, dloss, plain) * terms.scale

    return [(steps, "_slab_gradient", wrong)]


@mutant(Case("llama_capped"))
def soft_cap_is_dropped() -> list[Patch]:
    return [(lazy.LazyLogits, "scale_and_softcap", lambda self: (1.0, None))]


@mutant()
def loss_counts_the_target_on_every_rank() -> list[Patch]:
    right = loss.write_gradient
    return [(loss, "write_gradient", lambda *args: right(*args).clamp_min_(0))]


@mutant()
def loss_gradient_is_not_reduced() -> list[Patch]:
    def launch(self, dx):
        return wrongly.own_part(dx, self.chunks.spec.axis)

    return [(HeadGradients, "launch", launch)]


@mutant(Case("llama", sp=False))
def loss_gradient_is_averaged() -> list[Patch]:
    right = HeadGradients.launch
    return [
        (HeadGradients, "launch", lambda self, dx: right(self, dx / self.chunks.spec.axis.size))
    ]


# The final hidden states are gathered, and each rank has a part of their gradient.
@mutant(Case("llama", parallelize=(("keep_logits", True),)))
def loss_gradient_of_gathered_hidden_states_is_not_reduced() -> list[Patch]:
    return [(HeadGradients, "launch", lambda self, dx: dx)]


@mutant(Case("llama", parallelize=(("loss_chunk", 8),)))
def loss_gradient_goes_to_another_chunk() -> list[Patch]:
    right = HeadGradients.store

    def store(self, dx, rows):
        height = rows.stop - rows.start
        start = self.source.shape[1] - height - rows.start
        right(self, dx, slice(start, start + height) if start >= 0 else rows)

    return [(HeadGradients, "store", store)]


@mutant()
def loss_gathers_a_chunk_in_wrong_rank_order() -> list[Patch]:
    right = Chunks.__iter__

    def wrong(self):
        for x, y, rows in right(self):
            yield x.roll(x.shape[0] // self.ranks, 0), y, rows

    return [(Chunks, "__iter__", wrong)]


@mutant(Case("llama", parallelize=(("loss_chunk", 8),)))
def loss_keeps_only_the_last_chunks_weight_gradient() -> list[Patch]:
    return [(chunks, "_plus_product", lambda total, a, b: (a @ b).to(total.dtype))]


@mutant()
def labels_are_not_shifted() -> list[Patch]:
    right = head.F.pad
    return [(head.F, "pad", lambda x, pad, value: right(x, (1, 0), value=value))]


@mutant()
def labels_of_the_wrong_shard_order() -> list[Patch]:
    right = Chunks.__iter__

    def wrong(self):
        for x, y, rows in right(self):
            yield x, y.roll(y.shape[0] // self.ranks), rows

    return [(Chunks, "__iter__", wrong)]


@mutant()
def hidden_states_scattered_without_gather_in_backward() -> list[Patch]:
    right = block.StackBoundary.call

    def wrong(self, layer, *args, **kwargs):
        def of_own_tokens(*args, **kwargs):
            x = block.get_hidden_states(args, kwargs)
            args, kwargs = block.replace_hidden_states(args, kwargs, x.detach() + 0 * x)
            return layer(*args, **kwargs)

        return right(self, of_own_tokens, *args, **kwargs)

    return [(block.StackBoundary, "call", wrong)]
