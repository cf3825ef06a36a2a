"""Rank functions: a model that is read shard by shard, beside one that was loaded whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from harness.compare import gather_objects
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_sp import from_pretrained, parallel_state, parallelize
from hf_sp.errors import HfSpError


def both_ways(
    folder: str,
    options: dict[str, Any],
    model_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> list[str]:
    """What differs between ``from_pretrained`` and ``parallelize`` of transformers' own.

    The ranks' seeds differ: what is drawn has to be the first rank's.
    """
    made, drawn = [], []
    for ours in (False, True):
        torch.manual_seed(7 + dist.get_rank())
        if ours:
            model = from_pretrained(folder, model_class=model_class, **options, **kwargs)
        else:
            model = parallelize(model_class.from_pretrained(folder, **kwargs), **options)
        drawn.append(torch.rand(3))
        made.append(model)
    want, got = made
    problems = [] if torch.equal(*drawn) else ["the generator went on elsewhere"]
    if type(got) is not type(want) or got.training != want.training:
        problems.append(f"{type(got).__name__}, training={got.training}")
    for what in ("config", "generation_config"):
        told = getattr(got, what, None), getattr(want, what, None)
        if str(told[0]) != str(told[1]):
            problems.append(f"{what}: {told}")
    if str(parallel_state(got).plan) != str(parallel_state(want).plan):
        problems.append("another plan")
    tensors = [
        [*m.named_parameters(remove_duplicate=False), *m.named_buffers(remove_duplicate=False)]
        for m in (got, want)
    ]
    if [n for n, _ in tensors[0]] != [n for n, _ in tensors[1]]:
        problems.append("other names")
    same = {}
    for (name, x), (_, y) in zip(*tensors, strict=True):
        # Tied here is tied there.
        if same.setdefault(id(y), id(x)) != id(x):
            problems.append(f"{name} is not tied")
        problems += [f"{name}: {text}" for text in _differences(x, y)]
    return problems


def _differences(x: torch.Tensor, y: torch.Tensor) -> list[str]:
    what = [
        (str(getattr(t, "placements", "")), t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
        for t in (x, y)
    ]
    found = [] if what[0] == what[1] else [f"{what[0]}, want {what[1]}"]
    own, other = (t.to_local() if isinstance(t, DTensor) else t for t in (x, y))
    if own.shape != other.shape or not torch.equal(own, other):
        found.append("other numbers")
    # FSDP pads the last of uneven shards.
    mapped = not isinstance(x, DTensor) or x.device_mesh.ndim == 1
    if mapped and own.untyped_storage().nbytes() != own.nbytes:
        found.append(f"{own.nbytes} bytes in a storage of {own.untyped_storage().nbytes()}")
    return found


def refusal(folder: str, on: int | None = None, **kwargs: Any) -> tuple[str, str]:
    """The error of each rank; with ``on``, what that rank alone asks for goes wrong."""
    rank = dist.get_rank()
    name = "nowhere/at-all" if on == rank else folder
    try:
        from_pretrained(name, local_files_only=True, **kwargs)
    except (HfSpError, OSError, RuntimeError) as error:
        return type(error).__name__, str(error)
    finally:
        gather_objects(None)
    return "", ""
