"""Rank functions: torch's own checkpoint tools on a parallel model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import tiny
from harness.compare import whole
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hf_sp import parallelize

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def wrong(got: Any, want: Any) -> list[str]:
    """Names under which two mappings of tensors differ."""
    return [k for k in want if k not in got or not torch.equal(whole(got[k]), whole(want[k]))]


def models(folder: str, family: str, **options: Any) -> dict[str, list[str]]:
    """What differs from the unsharded model, by the way that the weights took."""
    model, other = tiny.build(family), tiny.build(family, seed=5)
    want, path = dict(model.state_dict()), Path(folder)

    def fresh() -> nn.Module:
        return parallelize(tiny.build(family, seed=9), **options)

    found = {}
    parallel = parallelize(copy.deepcopy(model), **options)
    if taken := get_model_state_dict(parallel, options=FULL):
        found["get"] = wrong(taken, want)
    for name, how, given in (
        ("set", FULL, True),
        ("set from the first", FROM_FIRST, dist.get_rank() == 0),
    ):
        target = fresh()
        set_model_state_dict(target, dict(other.state_dict()) if given else {}, options=how)
        found[name] = wrong(target.state_dict(), other.state_dict())
    dcp.save({"model": parallel.state_dict()}, checkpoint_id=path / "sharded")
    dcp.save({"model": want}, checkpoint_id=path / "plain")
    for name in ("sharded", "plain"):
        target = fresh()
        read = {"model": target.state_dict()}
        dcp.load(read, checkpoint_id=path / name)
        target.load_state_dict(read["model"])
        found[f"{name} into the parallel model"] = wrong(target.state_dict(), want)
    read = {"model": tiny.build(family, seed=9).state_dict()}
    dcp.load(read, checkpoint_id=path / "sharded")
    found["into the unsharded model"] = wrong(read["model"], want)
    dist.barrier()
    if dist.get_rank() == 0:
        dcp_to_torch_save(path / "sharded", path / "whole.pt")
        read = torch.load(path / "whole.pt", weights_only=True)
        found["as one file"] = wrong(read["model"], want)
    dist.barrier()
    return found


def optimizers(family: str, **options: Any) -> list[str]:
    """State of a step, made whole, and given to another optimizer from the first rank."""
    parallel, target = (parallelize(tiny.build(family), **options) for _ in range(2))
    made = torch.optim.AdamW(parallel.parameters())
    ids = torch.arange(24).view(2, 12)
    parallel(input_ids=ids, labels=ids).loss.backward()
    made.step()
    state = get_optimizer_state_dict(parallel, made, options=FULL)
    given = torch.optim.AdamW(target.parameters())
    set_optimizer_state_dict(
        target, given, state if dist.get_rank() == 0 else {}, options=FROM_FIRST
    )

    def flat(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        return {
            f"{name} {key}": value
            for name, p in model.named_parameters()
            for key, value in optimizer.state[p].items()
        }

    return wrong(flat(target, given), flat(parallel, made))
