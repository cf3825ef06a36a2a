"""Are all ranks of a tp group given the same batch, and is the model still the one we made?

Digests of the inputs are compared in every forward of training and evaluation, and in the first
ones of decoding; all that is known of them in the first ones, and where digests differ. Ranks with
different inputs get an error that names the cause, where the first activation collective would
have hung, or the batches been mixed.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sp.comm.calls import exchange
from hf_sp.errors import BatchMismatchError, ConfigError
from hf_sp.state import ParallelState

_Given = dict[str, tuple[str, float | None]]
_ROLES = ("input_ids", "inputs_embeds", "labels")


def check_forward(model: nn.Module, state: ParallelState, inputs: dict[str, Any]) -> None:
    """Compare this forward's inputs over the tp ranks.

    With data parallel groups all ranks learn of it if one group's batches differ; and that all
    groups train the same parameters: ids or embeddings, with or without labels. Their evaluations
    are compared in the first forwards only, as groups may have different numbers of them. Numbers
    are compared by a digest, floats by their absolute sum to 1e-3; objects (a cache) are not.

    Collectives: 1 all-gather of 40 bytes a rank, which the host waits for, as for the inputs; none
    in decoding after its first forwards. While checks are left, 1 all-gather of an object too.

    Raises:
        BatchMismatchError: on every rank, naming the inputs or the calls that differ.
        ConfigError: on every rank, if a parameter was added after ``parallelize`` (asked while
            checks are left).
    """
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    tokens = tensors.get("input_ids", tensors.get("inputs_embeds"))
    decoding = tokens is not None and tokens.shape[1:2] == (1,) and not torch.is_grad_enabled()
    # Groups whose prompts have other lengths have to count alike.
    decoding = decoding and state.data == 1
    kind = "training" if model.training else "decoding" if decoding else "evaluation"
    first = state.checks_left[kind] > 0
    always = kind == "training" or (kind == "evaluation" and state.data == 1)
    if not (first or always) or not all(type(t) is Tensor for t in tensors.values()):
        return
    if first:
        state.checks_left[kind] -= 1
        _check_parameters(model)
    if state.everyone.size == 1 or dist.get_backend(state.group) == "fake":
        return
    given = {k: _describe(v) for k, v in inputs.items() if v is not None}
    roles = [n for n in _ROLES if n in given]
    if not _same(state, kind, given, roles, first):
        _compare(model, state, given, roles)


def _same(state: ParallelState, kind: str, given: _Given, roles: list[str], first: bool) -> bool:
    """Whether digests of this forward's inputs suffice, and are the same where they must be."""
    finite = {name: x for name, (_, x) in given.items() if x is not None and math.isfinite(x)}
    texts = repr(sorted((name, text, name in finite) for name, (text, _) in given.items()))
    total = math.fsum(finite.values())
    words = (zlib.crc32(texts.encode()), total, zlib.crc32(repr(roles).encode()), int(first))
    call = f"an {kind} forward" if kind == "evaluation" else f"a {kind} forward"
    rows = exchange(state.all_ranks, state.mesh.device_type, call, words)
    if any(row[3] for row in rows):
        return False
    for i in range(0, len(rows), state.group_size):
        one, *others = rows[i : i + state.group_size]
        for other in others:
            if one[0] != other[0] or not math.isclose(one[1], other[1], rel_tol=1e-3, abs_tol=1e-8):
                return False
    return kind != "training" or all(row[2] == rows[0][2] for row in rows)


def _compare(model: nn.Module, state: ParallelState, given: _Given, roles: list[str]) -> None:
    """Compare all that is known of the inputs; on every rank, or on none."""
    everyone: list[Any] = [None] * state.everyone.size
    mine = (roles, given)
    dist.all_gather_object(everyone, mine, group=state.all_ranks)
    size = state.group_size
    groups = [everyone[i : i + size] for i in range(0, len(everyone), size)]
    rows = []
    for index, group in enumerate(groups):
        of = f" of group {index}" if len(groups) > 1 else ""
        rows += _differences([given for _, given in group], of)
    if rows:
        raise BatchMismatchError(
            "the ranks of one tensor-parallel group were given different batches",
            where="\n".join(rows),
            rule="every rank of a tp group is given the same whole batch; hf_sp shards it inside",
            remedy="shard the data over data-parallel ranks only: no DistributedSampler over tp "
            "ranks, the same seed and shuffling on all of them (Trainer does this by itself)",
        )
    if model.training and any(others != everyone[0][0] for others, _ in everyone):
        raise ConfigError(
            "data parallel groups were given inputs of different kinds",
            where=", ".join(_ROLES),
            got=f"here {roles}",
            rule="FSDP reduces the gradients of the same parameters on all of them",
            remedy="give all groups ids or all embeddings, and all or none labels",
        )


def _describe(value: Any) -> tuple[str, float | None]:
    """What has to be equal on all ranks, and a sum that may differ in its last bits.

    Of absolute values: a sum that cancels would be of rounding errors.
    """
    if not isinstance(value, Tensor):
        # Plain numbers (num_items_in_batch).
        return repr(value) if isinstance(value, int | float) else "given", None
    text = f"shape {tuple(value.shape)}, {value.dtype}"
    if value.is_complex() or not value.numel():
        return text, None
    if value.is_floating_point():
        # As the kernels that made it may do (inputs_embeds).
        return text, float(torch.linalg.vector_norm(value.detach(), 1, dtype=torch.float64))
    digest = zlib.crc32(value.cpu().contiguous().numpy().tobytes())
    return f"{text}, first value {int(value.flatten()[0])}, digest {digest:08x}", None


def _differences(given: list[_Given], of: str) -> list[str]:
    """What is not the same on the ranks of a group: a line for each input and rank."""
    rows = []
    for name in sorted(set().union(*given)):
        seen = [rank.get(name, ("missing", None)) for rank in given]
        texts = [text for text, _ in seen]
        sums = torch.tensor([x for _, x in seen if x is not None], dtype=torch.float64)
        close = torch.allclose(sums, sums[:1].expand_as(sums), rtol=1e-3, equal_nan=True)
        if not close and len(set(texts)) == 1:
            texts = [f"{text}, sum of absolute values {x}" for text, x in seen]
        if len(set(texts)) > 1:
            rows += [f"{name}, tp rank {i}{of}: {text}" for i, text in enumerate(texts)]
    return rows


def _check_parameters(model: nn.Module) -> None:
    plain = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
    if plain:
        raise ConfigError(
            "the model was given parameters after parallelize",
            where="\n".join(plain[:5]) + ("\n..." if len(plain) > 5 else ""),
            rule="every parameter is a DTensor on the model's mesh; a plain one would be trained "
            "on this rank's part of the gradient",
            remedy="build the whole model first, parallelize it last",
        )
