"""Mutants of what saves memory: own tokens of the embedding, inputs on the host, tiles."""

from __future__ import annotations

from dataclasses import replace

import torch
from harness.parity import Case

from hf_sp.comm import pairs
from hf_sp.model import offload, tiles
from hf_sp.model.embedding import VocabParallelEmbedding
from mutants.registry import Patch, mutant

PARTS = Case("llama_kv1", cp=2)
HOST = Case("llama", checkpoint="non_reentrant", parallelize=(("offload", True),))
TILES = Case("llama", parallelize=(("mlp_tile", 3),))


@mutant()
def own_tokens_of_the_embedding_are_not_summed() -> list[Patch]:
    def partial(self, ids, parts, sharded):
        return pairs.scatter_allgather(self._partial(ids, self.padding_idx), self.axis)

    return [(VocabParallelEmbedding, "_own", partial)]


@mutant(PARTS)
def the_embedding_of_another_part() -> list[Patch]:
    original = VocabParallelEmbedding._own

    def first(self, ids, parts, sharded):
        return original(self, ids, replace(parts, axis=replace(parts.axis, rank=0)), sharded)

    return [(VocabParallelEmbedding, "_own", first)]


@mutant(HOST)
def inputs_come_back_of_the_layer_before() -> list[Patch]:
    original = offload._Input.take

    def take(self):
        before = None if self.before is None else self.before()
        return original(self) if before is None else before.host.clone()

    return [(offload._Input, "take", take)]


@mutant(HOST)
def inputs_do_not_come_back() -> list[Patch]:
    return [(offload, "to_host", torch.zeros_like)]


@mutant(TILES)
def tiles_do_not_send_a_gradient() -> list[Patch]:
    return [(tiles, "checkpoint", lambda run, tile, **_: run(tile.detach()))]


@mutant(TILES)
def tiles_are_joined_in_another_order() -> list[Patch]:
    class Turned:
        def __getattr__(self, name):
            return getattr(torch, name)

        def cat(self, parts, dim):
            return torch.cat(parts, dim).roll(1, dim)

    return [(tiles, "torch", Turned())]
