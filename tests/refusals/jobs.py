"""Rank functions: what parallelize and the first forward refuse, on several ranks.

Each returns the text of the error (None if none came), for the test to look at on every rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from checkpoint.jobs import launched
from harness import tiny
from torch.distributed.device_mesh import init_device_mesh
from transformers import Trainer, TrainingArguments
from transformers.optimization import Adafactor

from hf_sp import parallelize
from hf_sp.errors import HfSpError


def _message(function: Callable[[], Any]) -> str | None:
    try:
        function()
    except HfSpError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _untouched(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = dict(model.named_parameters())
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return not hooks and all(after[n] is p for n, p in before.items())


def refuse(family: str = "llama", per_rank: dict[int, dict] | None = None, **kwargs: Any) -> tuple:
    """parallelize with (perhaps rank-dependent) arguments: (message, model untouched)."""
    model = tiny.build(family)
    before = dict(model.named_parameters())
    mine = {**kwargs, **(per_rank or {}).get(dist.get_rank(), {})}
    message = _message(lambda: parallelize(model, **mine))
    return message, _untouched(model, before)


def mesh_axes(names: tuple[str, ...], shape: tuple[int, ...]) -> tuple:
    """A mesh of the user's."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return refuse(mesh=mesh)


def different_batches(kind: str) -> str | None:
    """Ranks are given different batches."""
    model = parallelize(tiny.build("llama"))
    rank = dist.get_rank()
    ids = torch.arange(24).view(2, 12)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if rank:
        if kind == "values":
            batch["input_ids"] = batch["labels"] = ids.flip(0)
        elif kind == "length":
            batch = {k: v[:, :9] for k, v in batch.items()}
        elif kind == "labels":
            batch["labels"][0, 3] = -100
        elif kind == "missing":
            del batch["labels"]
        elif kind == "embeds":
            batch["inputs_embeds"] = torch.zeros(2, 12, 64, dtype=torch.float64)
            del batch["input_ids"]
    return _message(lambda: model(**batch))


def same_batches() -> str | None:
    """The same batch on all ranks, more often than it is checked; with extra objects."""
    model = parallelize(tiny.build("llama"))
    ids = torch.arange(24).view(2, 12)

    def run():
        for _ in range(10):
            model(input_ids=ids, labels=ids).loss.backward()

    return _message(run)


def later_parameters() -> str | None:
    """A parameter added after parallelize."""
    model = parallelize(tiny.build("llama"))
    model.model.extra = torch.nn.Parameter(torch.zeros(3))
    ids = torch.arange(12).view(1, 12)
    return _message(lambda: model(input_ids=ids))


def nothing_to_offload() -> tuple[str | None, ...]:
    """Without checkpoints; with them; where transformers moves the inputs itself."""
    model = parallelize(tiny.build("llama"), offload=True).train()
    ids = torch.arange(12).view(1, 12)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    def forward_alone() -> None:
        with torch.no_grad():
            model(input_ids=ids)

    found = [_message(step), _message(forward_alone)]
    model.gradient_checkpointing_enable()
    found.append(_message(step))
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = _moves_by_itself
    return *found, _message(step)


def _moves_by_itself(function: Callable[..., Any], *args: Any) -> Any:
    """As transformers' ``offload`` among the arguments of its checkpointing."""
    with torch.autograd.graph.save_on_cpu():
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def ids_out_of_range(where: str, value: int) -> str | None:
    """An id that no rank's part of the vocabulary holds."""
    model = parallelize(tiny.build("llama"))
    ids = torch.arange(12).view(1, 12)
    batch = {"input_ids": ids.clone(), "labels": ids.clone()}
    batch[where][0, 5] = value
    return _message(lambda: model(**batch))


def different_seeds() -> tuple[bool, bool]:
    """Ranks built different weights: (equal after parallelize, equal to rank 0's own)."""
    model = tiny.build("llama", seed=dist.get_rank())
    expected = tiny.build("llama", seed=0)
    model = parallelize(model)
    whole = {n: p.full_tensor() for n, p in model.named_parameters()}
    right = all(torch.equal(whole[n], p) for n, p in expected.named_parameters())
    digests: list = [None] * dist.get_world_size()
    dist.all_gather_object(digests, {n: float(t.sum()) for n, t in whole.items()})
    return all(d == digests[0] for d in digests), right


def resized() -> tuple[str | None, str | None]:
    """A vocabulary resized after parallelize; asked for without a size, it is only looked at."""
    model = parallelize(tiny.build("llama"))
    return (
        _message(lambda: model.resize_token_embeddings(100)),
        _message(lambda: model.resize_token_embeddings()),
    )


def twice() -> tuple[str | None, str | None]:
    """parallelize called again, on the model and on its decoder."""
    model = parallelize(tiny.build("llama"))
    return _message(lambda: parallelize(model)), _message(lambda: parallelize(model.model))


def deep_copy_works() -> bool:
    """A copy of a parallel model runs and is independent of the original."""
    model = parallelize(tiny.build("llama"))
    other = copy.deepcopy(model)
    ids = torch.arange(24).view(2, 12)
    first, second = model(input_ids=ids, labels=ids), other(input_ids=ids, labels=ids)
    second.loss.backward()
    alone = all(p.grad is None for p in model.parameters())
    trained = all(p.grad is not None for p in other.parameters())
    return bool(first.loss == second.loss) and alone and trained


class Raw(torch.optim.Optimizer):
    """Stands for an optimizer with kernels of its own."""

    __module__ = "bitsandbytes.optim.adamw"

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


class Lomo(Raw):
    """Stands for an optimizer of a package that is not installed."""

    __module__ = "lomo_optim.lomo"


class Own(torch.optim.AdamW):
    """A user's: a step of his own around AdamW's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Ratio(torch.optim.Optimizer):
    """A user's, whole: the step's length is a ratio of norms, as numbers."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=0.01 * p.norm().item() / float(p.grad.norm()))


def _made(kind: str, parameters: Any, **options: Any) -> Any:
    kinds = {"transformers": Adafactor, "bitsandbytes": Raw, "lomo": Lomo, "Own": Own}
    kinds["Ratio"] = Ratio
    # Muon is for matrices.
    given = [p for p in parameters if kind != "Muon" or p.dim() == 2]
    return (kinds.get(kind) or getattr(torch.optim, kind))(given, **options)


def optimizer(kind: str, **options: Any) -> tuple[str | None, str | None]:
    """What is said when an optimizer is made: over a parallel model, and over a plain one."""
    model, plain = parallelize(tiny.build("llama")), tiny.build("llama")
    return (
        _message(lambda: _made(kind, model.parameters(), **options)),
        _message(lambda: _made(kind, plain.parameters(), **options)),
    )


def optimizer_of_trainer(folder: str, name: str) -> str | None:
    """What the Trainer says when it is made; its package need not be there."""
    model = parallelize(tiny.build("llama"))
    with launched():
        arguments = TrainingArguments(folder, optim=name, use_cpu=True, report_to="none")
        return _message(lambda: Trainer(model, arguments))


def steps_of_own_optimizers() -> dict[str, float]:
    """Weights after two steps of a user's optimizers: the largest difference from one process."""
    found = {}
    ids = torch.arange(24).view(2, 12)
    for kind in (Own, Ratio):
        plain = tiny.build("llama", torch.float64, vocab_size=61)
        parallel = parallelize(copy.deepcopy(plain))
        for model in (plain, parallel):
            optimizer = kind(model.parameters())
            for _ in range(2):
                optimizer.zero_grad()
                model(input_ids=ids).logits.logsumexp(-1).mean().backward()
                optimizer.step()
        pairs = zip(plain.parameters(), parallel.parameters(), strict=True)
        found[kind.__name__] = max(float((p - q.full_tensor()).abs().max()) for p, q in pairs)
    return found


class Around(torch.nn.Module):
    """A user's wrapper."""

    def __init__(self, lm: torch.nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, **kwargs: Any) -> Any:
        return self.lm(**kwargs)


def wrapped_or_debugged(folder: str) -> list[str | None]:
    """A module around the model, given to Trainer and to accelerate; Trainer's debug option."""
    model = parallelize(tiny.build("llama"))

    def train(given: torch.nn.Module, **options: Any) -> Any:
        return Trainer(given, TrainingArguments(folder, use_cpu=True, report_to="none", **options))

    with launched():
        return [
            _message(lambda: train(Around(model))),
            _message(lambda: Accelerator(cpu=True).prepare(Around(model))),
            _message(lambda: train(model, debug="underflow_overflow")),
        ]


def takes(family: str, sizes: dict[str, int], **degrees: int) -> str | None:
    """What `parallelize` says to these degrees; None if it takes them and a step runs."""
    model = tiny.build(family, **sizes)

    def step() -> None:
        parallel = parallelize(model, **degrees)
        ids = torch.arange(14).view(2, 7)
        parallel(input_ids=ids, labels=ids).loss.backward()

    return _message(step)
