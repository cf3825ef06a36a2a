"""Mutants of what data parallel ranks add."""

from __future__ import annotations

import functools
from dataclasses import replace

from data_parallel.policy_jobs import HALF, OFFLOAD, reach_all
from harness.parity import Case
from torch.distributed.fsdp import OffloadPolicy

from hf_sp import api
from hf_sp.model.fsdp import shard_over_data
from hf_sp.model.local import cast_for_autocast, local, local_of_groups
from hf_sp.moe import block as sparse
from mutants.registry import Patch, mutant

SPREAD = Case("mixtral", data=2, parallelize=(("ep", 4),))


@mutant(SPREAD, tp=4)
def experts_of_all_groups_summed() -> list[Patch]:
    return [(sparse, "local_of_groups", lambda x, count: x.to_local())]


@mutant(SPREAD, tp=4)
def experts_averaged_over_ranks_instead_of_groups() -> list[Patch]:
    return [(sparse, "local_of_groups", lambda x, count: local_of_groups(x, 2 * count))]


@mutant(Case("qwen2_moe", data=2, parallelize=(("ep", 2),)), tp=4)
def experts_averaged_by_fsdp_and_by_us() -> list[Patch]:
    def averaged(self, name, like):
        p = getattr(self.experts, name)
        return cast_for_autocast(local_of_groups(local(p), self.state.data), like)

    return [(sparse.SparseBoundary, "weight", averaged)]


@mutant(Case("llama", data=2), tp=4)
def groups_train_for_themselves() -> list[Patch]:
    return [(api, "shard_over_data", lambda *args: None)]


POLICIES = Case(
    "llama",
    data=2,
    dtype="float32",
    parallelize=(("mp_policy", HALF), ("offload_policy", OFFLOAD)),
)
policy = functools.partial(mutant, POLICIES, tp=4, check=reach_all)


def _with(**fields):
    def wrong(model, state, mesh):
        for name, value in fields.items():
            setattr(state, name, value)
        shard_over_data(model, state, mesh)

    return [(api, "shard_over_data", wrong)]


@policy()
def weights_gathered_in_their_own_dtype() -> list[Patch]:
    return _with(mp_policy=replace(HALF, param_dtype=None))


@policy()
def gradients_reduced_in_bfloat16() -> list[Patch]:
    return _with(mp_policy=replace(HALF, reduce_dtype=None))


@policy()
def nothing_offloaded() -> list[Patch]:
    return _with(offload_policy=OffloadPolicy())
