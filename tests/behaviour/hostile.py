"""Rank functions: what an auditor does to a model to see whether its gradients hold."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import batches, tiny
from harness.compare import compare_gradients, compare_loss, gradients
from harness.parity import Case, pair
from harness.report import Report
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from hf_sp import parallelize
from hf_sp.errors import ConfigError, HfSpError

Batch = dict[str, Any]
Use = Callable[[nn.Module, Batch], Any]
USES: dict[str, Use] = {}


def use(function: Use) -> Use:
    """Register something done to either model; it ends in gradients, and may return a tensor."""
    USES[function.__name__] = function
    return function


def compare(name: str, sp: bool) -> Report:
    """Do it to the unsharded and to the parallel model; compare gradients and what it returns."""
    import behaviour.own_products  # noqa: F401 (registers some; a rank imports this module alone)

    model, parallel = pair(Case("llama_odd_vocab", sp=sp))
    batch = batches.plain(2, 17, 61)
    report = Report(f"{name} sp={sp}", dist.get_rank(), "float64")
    want, got = (USES[name](one, dict(batch)) for one in (model, parallel))
    if isinstance(want, Tensor):
        report.compare("result", got, want)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    if any(
        p.grad is not None and not p.grad.to_local().isfinite().all() for p in parallel.parameters()
    ):
        report.problems.append("gradients are not finite")
    return report


def _again(model: nn.Module, path: str) -> None:
    """Recompute one module of each layer in backward, below its hooks."""
    for layer in model.model.layers:
        module: Any = layer.get_submodule(path)
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def _logits_loss(model: nn.Module, batch: Batch) -> None:
    model(input_ids=batch["input_ids"]).logits.square().mean().backward()


@use
def mlp_recomputed(model: nn.Module, batch: Batch) -> None:
    _again(model, "mlp")
    _logits_loss(model, batch)


@use
def attention_recomputed(model: nn.Module, batch: Batch) -> None:
    _again(model, "self_attn")
    _logits_loss(model, batch)


@use
def norm_and_linears_recomputed(model: nn.Module, batch: Batch) -> None:
    for path in ("input_layernorm", "self_attn.q_proj", "mlp.gate_proj"):
        _again(model, path)
    _logits_loss(model, batch)


@use
def rows_recomputed(model: nn.Module, batch: Batch) -> None:
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        _again(model, path)
    _logits_loss(model, batch)


@use
def mlp_recomputed_over_two_forwards(model: nn.Module, batch: Batch) -> None:
    _again(model, "mlp")
    first = model(input_ids=batch["input_ids"]).logits.square().mean()
    second = model(input_ids=batch["input_ids"][:, :9]).logits.square().mean()
    (first + second).backward()


@use
def mlp_by_tiles(model: nn.Module, batch: Batch) -> None:
    for layer in model.model.layers:

        def tiles(x: Tensor, forward: Any = layer.mlp.forward) -> Tensor:
            return torch.cat(
                [checkpoint(forward, part, use_reentrant=False) for part in x.split(5, 1)], 1
            )

        layer.mlp.forward = tiles
    _logits_loss(model, batch)


@use
def anomaly_mode(model: nn.Module, batch: Batch) -> None:
    with torch.autograd.detect_anomaly():
        _logits_loss(model, batch)


@use
def no_counted_label(model: nn.Module, batch: Batch) -> None:
    batch["labels"] = torch.full_like(batch["labels"], -100)
    # transformers' own loss: nan, and gradients of exactly zero.
    if not hasattr(model, "_hf_sp_state"):
        model.__dict__.pop("_loss_function", None)
    loss = model(**batch).loss
    assert loss.isnan()
    loss.backward()


@use
def head_on_detached(model: nn.Module, batch: Batch) -> Tensor:
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
    leaf = hidden.detach().requires_grad_()
    model.lm_head(leaf).square().mean().backward()
    return leaf.grad


@use
def head_on_detached_alone(model: nn.Module, batch: Batch) -> None:
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
    model.lm_head(hidden.detach()).square().mean().backward()


@use
def hidden_states_watched(model: nn.Module, batch: Batch) -> Tensor:
    output = model(input_ids=batch["input_ids"], output_hidden_states=True)
    output.hidden_states[-1].retain_grad()
    model.lm_head(output.hidden_states[-1]).square().mean().backward()
    return output.hidden_states[-1].grad


@use
def logit_lens(model: nn.Module, batch: Batch) -> None:
    output = model(**batch, output_hidden_states=True)
    early = model.lm_head(model.model.norm(output.hidden_states[1]))
    (output.loss + early.square().mean()).backward()


@use
def gradient_of_a_block_input_first(model: nn.Module, batch: Batch) -> None:
    seen: list[Tensor] = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    loss = model(**batch).loss
    handle.remove()
    torch.autograd.grad(loss, seen[0], retain_graph=True, allow_unused=True)
    loss.backward()


class _Foreign(torch.autograd.Function):
    """Somebody's fused function: torch shows it what it is given as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


@use
def class_with_a_forward_of_its_own(model: nn.Module, batch: Batch) -> None:
    """As patches of whole model classes do, with a fused function on the hidden states."""

    def forward(self: Any, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> CausalLMOutput:
        kwargs.pop("logits_to_keep", None)
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(_Foreign.apply(hidden))
        loss = self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    with mock.patch.object(type(model), "forward", forward):
        model(**batch).loss.backward()


@use
def another_loss_on_a_block_input(model: nn.Module, batch: Batch) -> None:
    """The first backward ends before the entry; the second comes to it past the columns."""
    seen: list[Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    loss = model(**batch).loss
    handle.remove()
    torch.autograd.grad(loss, seen[0], retain_graph=True, allow_unused=True)
    # Inside a block each rank has a part of the gradient: of what all compute alike, 1 / tp.
    parts = dist.get_world_size() if hasattr(model, "_hf_sp_state") else 1
    (seen[0].square().sum() / (100 * parts)).backward()


@use
def gradient_hook_on_a_block_input(model: nn.Module, batch: Batch) -> None:
    def watch(module: nn.Module, args: tuple) -> None:
        args[0].register_hook(lambda grad: 3 * grad)

    handle = model.model.layers[1].mlp.register_forward_pre_hook(watch)
    model(**batch).loss.backward()
    handle.remove()


@use
def checkpoint_around_the_loss(model: nn.Module, batch: Batch) -> None:
    checkpoint(lambda: model(**batch).loss, use_reentrant=False).backward()


@use
def backward_hook_on_the_head(model: nn.Module, batch: Batch) -> None:
    handle = model.lm_head.register_full_backward_hook(lambda m, into, out: None)
    # The head then makes logits, and transformers' own float32 loss would run: one's own does not.
    logits = model(input_ids=batch["input_ids"]).logits
    logits.square().mean().backward()
    handle.remove()


@use
def inference_mode(model: nn.Module, batch: Batch) -> Tensor:
    with torch.inference_mode():
        logits = model(input_ids=batch["input_ids"]).logits.clone()
        tokens = model.generate(batch["input_ids"][:, :5], max_new_tokens=4, do_sample=False)
    model(**batch).loss.backward()
    return torch.cat([logits.flatten(), tokens.flatten().double()])


def hooks_of_before(sp: bool) -> Report:
    """A steering hook on a block, registered before parallelize, adds to the whole output."""
    model = tiny.build("llama_odd_vocab")
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(64, generator=generator, dtype=torch.float64)
    model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: out + vector)
    parallel = parallelize(copy.deepcopy(model), sp=sp)
    tiny.reference(model)
    report = Report("hooks of before", dist.get_rank(), "float64")
    batch = batches.plain(2, 16, 61)
    for one in (model, parallel):
        one(**batch).loss.backward()
    compare_loss(report, parallel(**batch).loss, model(**batch).loss)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report


def tuples() -> tuple[bool, bool, bool]:
    """return_dict=False: places kept, and hidden states whole where the config asks for tuples."""
    model = parallelize(tiny.build("llama_odd_vocab"))
    batch = batches.plain(2, 17, 61)
    output = model(**batch, return_dict=False, use_cache=False)
    model.config.return_dict = False
    hidden = model.model(input_ids=batch["input_ids"], output_hidden_states=True)[-1]
    return output[0].dim() == 0, output[1] is None, all(h.shape == (2, 17, 64) for h in hidden)


def second_derivative() -> str:
    """Double backward is refused by autograd, not wrong."""
    model = parallelize(tiny.build("llama"))
    loss = model(**batches.plain(2, 16)).loss
    weight = model.model.norm.weight
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    try:
        grad.to_local().square().sum().backward()
    except ConfigError as error:
        return str(error)
    return ""


def ranks_with_other_tensors(kind: str) -> str:
    """Models of another shape, dtype or trainability on one rank."""
    other = dist.get_rank() == 1
    if kind == "vocabulary":
        model = tiny.build("llama", vocab_size=100 if other else 96)
    elif kind == "dtype":
        model = tiny.build("llama", torch.float32 if other else torch.float64)
    else:
        model = tiny.build("llama")
        model.model.norm.weight.requires_grad_(not other)
    try:
        parallelize(model)
    except HfSpError as error:
        return str(error)
    return ""


def batches_of_later(kind: str) -> str:
    """Training forwards have used up their checks; another kind of forward differs."""
    model = parallelize(tiny.build("llama"))
    ids = torch.arange(24).view(2, 12)
    for _ in range(10):
        model(input_ids=ids, labels=ids)
    mine = ids + dist.get_rank()
    try:
        if kind == "evaluation":
            model.eval()
            with torch.no_grad():
                model(input_ids=mine)
        else:
            again = parallelize(tiny.build("llama"))
            items = 11 if dist.get_rank() else 14
            again(input_ids=ids, labels=ids, num_items_in_batch=items)
    except HfSpError as error:
        return str(error)
    return ""
