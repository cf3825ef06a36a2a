"""Mutants of what a checkpoint lacks: made on every rank, the first rank's, cut."""

from __future__ import annotations

import functools

from harness.parity import Case
from loading.jobs import lacking_all

from hf_sp import loading
from hf_sp.comm.shard import take_shard, with_local
from mutants import registry
from mutants.registry import Patch

mutant = functools.partial(registry.mutant, Case("llama_bias"), check=lacking_all)


@mutant()
def each_rank_keeps_what_it_has_drawn() -> list[Patch]:
    return [(loading, "agree_on_weights", lambda *args: [])]


@mutant()
def all_ranks_cut_the_first_part() -> list[Patch]:
    def first(full, like, device):
        part = take_shard(full, like.placements[0], like.device_mesh.size(), 0, device)
        return with_local(part, like)

    return [(loading, "shard_like", first)]
