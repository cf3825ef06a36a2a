"""One family on this rank: the parallel model against the unsharded one, in float64.

Owns: what is compared, and how closely. Must not know: which families there are, how ranks started.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sp import parallelize
from scripts._families import models, vision

# Transformers computes its loss, and many a norm and router, in float32 in a float64 model too:
# each rounds by 6e-8, and a rank's part otherwise than the whole. Faults are above 1e-4.
LIMIT = 1e-5
# A gradient that cancels is judged by the largest of its block.
FLOOR = 1e-3
MAX_NORM = 0.1


def check(family: str) -> dict[str, Any]:
    """What differs, on this rank: the largest relative error by kind; texts of what is wrong.

    Collectives: the models', and gathers of the results.
    """
    name, _, head = family.partition(", ")
    left = name not in models.RIGHT_PADDED
    if family in vision.FAMILIES:
        model, batches = vision.build(family).train(), vision.batches(family, left)
    else:
        model = models.build(family).train()
        vocab = model.config.get_text_config().vocab_size
        batches = models.batches(vocab, left, head=head)
    parallel = parallelize(copy.deepcopy(model))
    found: dict[str, Any] = {"problems": []}
    errors: dict[str, float] = dict.fromkeys(("loss", "gradients", "weights", "logits"), 0.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=2.0, momentum=0.9) for m in (model, parallel)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in batches:
        losses = []
        for one in (model, parallel):
            one.zero_grad(set_to_none=True)
            loss = one(**batch, **({} if head else {"use_cache": False})).loss
            loss.backward()
            losses.append(loss.detach())
        _worst(errors, "loss", losses[1], losses[0])
        want, got = _gradients(model), _gradients(parallel)
        if want.keys() != got.keys():
            found["problems"].append(f"gradients of others: {sorted(want.keys() ^ got.keys())[:3]}")
        floors = _floors(want)
        for name in want.keys() & got.keys():
            _worst(errors, "gradients", got[name], want[name], floors[_block(name)])
        norms = [nn.utils.clip_grad_norm_(m.parameters(), MAX_NORM) for m in (model, parallel)]
        _worst(errors, "gradients", _whole(norms[1]), norms[0])
        for optimizer in optimizers:
            optimizer.step()
    after = dict(parallel.named_parameters())
    changes = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    floors = _floors(changes)
    for name, change in changes.items():
        got_change = _whole(after[name].detach()) - before[name]
        # Each step rounds a weight (a router's may be float32) in either model.
        rounding = 2 * torch.finfo(change.dtype).eps * _size(before[name]) / LIMIT
        _worst(errors, "weights", got_change, change, max(floors[_block(name)], rounding))
    model.eval()
    parallel.eval()
    with torch.no_grad():
        inputs = {k: v for k, v in batches[0].items() if k in models.INPUTS}
        # What a row that sees nothing makes is anything.
        real = ... if head == "sequence classification" else inputs["attention_mask"].bool()
        name = "start_logits" if head == "question answering" else "logits"
        logits = [_whole(m(**inputs)[name])[real] for m in (model, parallel)]
        _worst(errors, "logits", logits[1], logits[0])
        if not head:
            tokens = [_generate(m, inputs["input_ids"][1:, :6]) for m in (model, parallel)]
            if not torch.equal(*tokens):
                found["problems"].append("generate gives other tokens")
    if not _saved_alike(parallel):
        found["problems"].append("the saved checkpoint is another model")
    over = [f"{kind} differ by {error:.0e}" for kind, error in errors.items() if not error < LIMIT]
    return {**found, "errors": errors, "problems": over + found["problems"]}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: _whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def _floors(tensors: dict[str, Tensor]) -> dict[str, float]:
    floors: dict[str, float] = {}
    for name, x in tensors.items():
        floors[_block(name)] = max(floors.get(_block(name), 0.0), FLOOR * _size(x))
    return floors


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _size(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _block(name: str) -> str:
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 2])


def _worst(
    errors: dict[str, float], kind: str, got: Tensor, want: Tensor, floor: float = 0.0
) -> None:
    if got.shape != want.shape:
        errors[kind] = float("inf")
        return
    error = _size(got - want) / max(_size(want), floor, 1e-300)
    # Not max(): it would lose a nan.
    errors[kind] = errors[kind] if error <= errors[kind] else error


def _generate(model: Any, ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **how)


def _saved_alike(parallel: Any) -> bool:
    """Whether plain transformers reads what was saved, to the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        shared: list[Any] = [folder]
        dist.broadcast_object_list(shared)
        parallel.save_pretrained(shared[0])
        dist.barrier()
        read = type(parallel).from_pretrained(Path(shared[0]), dtype=torch.float64)
        dist.barrier()
    theirs = dict(read.named_parameters())
    mine = {name: _whole(p.detach()) for name, p in parallel.named_parameters()}
    return theirs.keys() == mine.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
