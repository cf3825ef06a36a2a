"""Rank functions: a model that is read shard by shard, beside one that was loaded whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import huggingface_hub
import torch
import torch.distributed as dist
from harness import batches, tiny
from harness.compare import attempt, compare_gradients, fresh, gradients, whole
from harness.parity import Case, around
from harness.report import Report
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, modeling_utils
from transformers.core_model_loading import Chunk, WeightConverter

from hf_sp import from_pretrained, parallel_state, parallelize
from hf_sp.errors import HfSpError
from hf_sp.estimate.accounting import StepAccounting


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


def refusal(
    folder: str, on: int | None = None, folders: list[str] | None = None, **kwargs: Any
) -> tuple[str, str]:
    """The error of each rank. Rank ``on`` has no files; each has its own of ``folders``."""
    rank = dist.get_rank()
    name = "/nowhere" if on == rank else folders[rank] if folders else folder
    try:
        from_pretrained(name, **kwargs)
    except (HfSpError, OSError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "", ""


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1, which is read at import."""
    with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
        yield


def from_cache(folder: str, name: str, cache_dir: str) -> list[str]:
    """What differs between the model by its name and the files that are there."""
    with _offline():
        got = from_pretrained(name, cache_dir=cache_dir)
    want = from_pretrained(folder)
    pairs = zip(got.named_parameters(), want.parameters(), strict=True)
    return [n for (n, x), y in pairs if not torch.equal(x.to_local(), y.to_local())]


def from_cache_refused(name: str, cache_dir: str) -> tuple[str, str]:
    """What is said of a model that nobody has downloaded."""
    with _offline():
        return refusal(name, cache_dir=cache_dir)


def lacking_all(cases: Iterable[Case]) -> list[Report]:
    """For each case: weights that the checkpoint lacks are what the first rank's seed draws."""
    return [attempt(str(case), lambda case=case: _lacking(case)) for case in cases]


def _lacking(case: Case) -> Report:
    report = Report(str(case), dist.get_rank(), "float32")
    model = tiny.build(case.family, torch.float32)
    lost = "q_proj.weight", "down_proj.weight", "lm_head.weight"
    kept = {n: p for n, p in model.state_dict().items() if not n.endswith(lost)}
    how = {"config": model.config, "state_dict": kept, "dtype": torch.float32}
    torch.manual_seed(5)
    want = type(model).from_pretrained(None, **how)
    torch.manual_seed(5 + dist.get_rank())
    with around(case):
        got = from_pretrained(None, model_class=type(model), **how)
    for (name, mine), other in zip(got.named_parameters(), want.parameters(), strict=True):
        report.compare(name, whole(mine), other)
    return report


def loading_info(folder: str) -> dict[str, Any]:
    """What is told with ``output_loading_info``."""
    model, told = from_pretrained(folder, output_loading_info=True)
    assert parallel_state(model) is not None
    return told


def elements_read(folder: str, options: dict[str, Any]) -> tuple[int, int]:
    """Elements that this rank reads from files, and that it keeps."""
    counts: list[int] = []

    class Slice:
        def __init__(self, inside: Any) -> None:
            self.inside = inside

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inside, name)

        def __getitem__(self, index: Any) -> torch.Tensor:
            part = self.inside[index]
            counts.append(part.numel())
            return part

    class File:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.inside = safe_open(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inside, name)

        def __exit__(self, *args: Any) -> None:
            self.inside.__exit__(*args)

        def get_slice(self, name: str) -> Slice:
            return Slice(self.inside.get_slice(name))

    with mock.patch.object(modeling_utils, "safe_open", File):
        model = from_pretrained(folder, **options)
    return sum(counts), sum(p.to_local().numel() for p in model.parameters())


class OwnMemory(StepAccounting):
    """What a rank has in memory of its own; a mapped file is read again when it has to be."""

    def _note(self, tensor: torch.Tensor, op: str | None) -> None:
        super()._note(tensor, op if tensor.untyped_storage().resizable() else None)


def peak(folder: str, options: dict[str, Any], **kwargs: Any) -> dict[str, int]:
    """Bytes alive at most while this rank loads, and those that it keeps."""
    with OwnMemory() as counted:
        model = from_pretrained(folder, **options, **kwargs)
    kept = sum(p.to_local().untyped_storage().nbytes() for p in model.parameters())
    return {"peak": counted.peak_bytes, "shard": kept}


def other_layout(folder: str) -> tuple[str, str]:
    """A checkpoint whose tensors transformers would convert from another layout."""
    conversion = WeightConverter(["self_attn.q_proj"], ["self_attn.q_proj"], [Chunk(dim=0)])
    mapping = mock.Mock(return_value=[conversion])
    with mock.patch.object(modeling_utils, "get_model_conversion_mapping", mapping):
        return refusal(folder)


def fills_meta(case: Case) -> Report:
    """A model that was parallelized on meta, and given its values afterwards."""
    report = Report(str(case), dist.get_rank(), case.dtype)
    model = tiny.build(case.family)
    with torch.device("meta"):
        parallel = parallelize(tiny.build(case.family))
    parallel.to_empty(device="cpu")
    parallel.tie_weights()
    parallel.load_state_dict(model.state_dict())
    for (_, mine), (_, other) in zip(parallel.named_buffers(), model.named_buffers(), strict=True):
        mine.copy_(other)
    tiny.reference(model)
    for one in (model, parallel):
        one(**fresh(batches.plain(2, 9))).loss.backward()
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report
