"""Rank functions: ``hf_sp.verify`` on models that are right, and on models with a planted fault."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable
from typing import Any
from unittest import mock

import peft
import torch
import torch.distributed as dist
from harness import batches, tiny
from mutants import MUTANTS, applied
from transformers import AutoConfig

import hf_sp
from hf_sp.comm import collectives as comm
from hf_sp.errors import HfSpError
from hf_sp.estimate import StepAccounting
from hf_sp.proof import by_layer, expected
from hf_sp.proof import verify as verify_module
from hf_sp.state import parallel_state


def verified(family: str, batch: str = "left_padded", length: int = 17, **options: Any) -> Any:
    """The verification of a tiny model; what is refused as its text."""
    model = tiny.build(family, options.get("dtype", torch.float64))
    if options.pop("lora", False):
        how = peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, how)
        for n, p in model.named_parameters():
            p.data = torch.full_like(p, 0.1).cumsum(0) if "lora_B" in n else p.double()
    before = {name: p.clone() for name, p in model.named_parameters()}
    given = getattr(batches, batch)(2, length, model.config.vocab_size)
    free = options.pop("free", expected.available_memory())
    try:
        with mock.patch.object(expected, "available_memory", return_value=free):
            found = hf_sp.verify(model, given, **options)
    except HfSpError as error:
        return str(error)
    # The model that was given is as it was.
    assert parallel_state(model) is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    return found


def read(folder: str, **options: Any) -> Any:
    """The verification of what a folder has, or its config alone."""
    config = AutoConfig.from_pretrained(folder)
    batch = batches.left_padded(2, 17, config.vocab_size)
    return [hf_sp.verify(given, batch, **options) for given in (folder, config)]


def alive(layers: int, by_layer: bool) -> int:
    """Most bytes alive on a rank while a model on disk is compared."""
    config = tiny.config("llama", num_hidden_layers=layers)
    batch = batches.plain(2, 8, config.vocab_size)
    gc.collect()
    with StepAccounting() as accounting:
        assert hf_sp.verify(config, batch, layers=by_layer)
    return accounting.peak_bytes


def with_faults(names: Iterable[str], layers: bool = False) -> dict[str, hf_sp.Verification]:
    """A verification for each fault: a mutant of the registry, or one of ``PLANTED``."""
    found = {}
    for name in names:
        case = MUTANTS[name].case if name in MUTANTS else None
        family = case.family if case is not None else "llama_bias"
        options = dict(case.parallelize) if case is not None else {}
        sp = case.sp if case is not None else True
        with applied(name) if case is not None else _planted(name):
            batch = batches.left_padded(2, 17, tiny.config(family).vocab_size)
            made = lambda family=family: tiny.build(family)  # noqa: E731
            found[name] = hf_sp.verify(made, batch, sp=sp, layers=layers, **options)
    return found


def _unsynced_norm(model: torch.nn.Module) -> None:
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.model.layers[1].input_layernorm.weight.to_local()[3] += 1e-9


def _unsynced_buffer(model: torch.nn.Module) -> None:
    if dist.get_rank() == 1:
        model.model.rotary_emb.inv_freq[0] *= 1 + 1e-14


def _one_more_gather(model: torch.nn.Module) -> None:
    """Of no effect on any number: somebody's hook that looks at all tokens."""
    axis = parallel_state(model).axis

    def look(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        comm.all_gather(output.detach(), axis)

    model.model.layers[0].input_layernorm.register_forward_hook(look)


def _one_more_sum_in_backward(model: torch.nn.Module) -> None:
    """Of no effect either: a tensor hook, as of who logs norms of gradients."""
    axis = parallel_state(model).axis

    def log(grad: torch.Tensor) -> None:
        comm.all_reduce(grad.square().sum(), axis)

    def watch(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(log)

    model.model.layers[1].mlp.down_proj.register_forward_hook(watch)


PLANTED = {
    "one_more_sum_in_backward": _one_more_sum_in_backward,
    "unsynced_norm": _unsynced_norm,
    "unsynced_buffer": _unsynced_buffer,
    "one_more_gather": _one_more_gather,
}


@contextlib.contextmanager
def _planted(name: str):
    right = hf_sp.parallelize

    def wrong(*args: Any, **kwargs: Any) -> Any:
        model = right(*args, **kwargs)
        # A piece has one layer.
        with contextlib.suppress(AttributeError):
            PLANTED[name](model)
        return model

    with (
        mock.patch.object(verify_module, "parallelize", wrong),
        mock.patch.object(by_layer, "parallelize", wrong),
    ):
        yield


def replicas(data: int = 1) -> list[str]:
    """What ``check_replicas`` says of a model as it is, after a write of all, and of one rank."""
    degrees = {} if data == 1 else {"dp_replicate": data}
    model = hf_sp.parallelize(tiny.build("llama_bias"), **degrees)
    said = []
    norm = model.model.layers[0].self_attn.o_proj.bias
    shard = model.model.layers[0].mlp.up_proj.weight
    for rank, p in ((None, norm), (0, norm), (1, shard)):
        with torch.no_grad():
            if rank in (None, dist.get_rank()):
                p.to_local().view(-1)[0] += 1e-9
        try:
            hf_sp.check_replicas(model)
            said.append("")
        except hf_sp.errors.ReplicaError as error:
            said.append(str(error))
        with torch.no_grad():
            if rank == dist.get_rank():
                p.to_local().view(-1)[0] -= 1e-9
    return said
