"""Ways to call a model and to use what it returns; rank functions that hold a parallel one to each.

In float64, judged at 1e-10.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from harness import batches, tiny
from harness.batches import Batch
from harness.compare import (
    compare_gradients,
    compare_once,
    compare_plain,
    evaluating,
    fresh,
    gradients,
)
from harness.parity import Case, each, pair
from harness.report import Report
from torch import Tensor, nn


def uses(case: Case) -> dict[str, Report]:
    """Each probe in USES, on fresh gradients of one pair of models."""
    model, parallel = pair(case)
    # HF returns attention weights with eager attention only.
    names = [name for name in USES if name != "attentions" or case.attn == "eager"]

    def run(report: Report, name: str) -> None:
        for one in (model, parallel):
            one.train().zero_grad(set_to_none=True)
        USES[name](report, model, parallel, batches.left_padded(2, 17, model.config.vocab_size))

    return each(case, names, run)


def _backward_of(report: Report, model: nn.Module, parallel: nn.Module, run: Any) -> None:
    """`run(model)` calls backward and returns tensors: they and all gradients must agree."""
    want, got = run(model), run(parallel)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        compare_plain(report, f"value {index}", one, other)
    compare_gradients(report, gradients(parallel, report), gradients(model))


def _weights_like(x: Tensor) -> Tensor:
    """Fixed weights for a scalar of `x`, equal on all ranks.

    A plain sum would leave most of a gradient untested.
    """
    generator = torch.Generator().manual_seed(17)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def _weighted(x: Tensor) -> Tensor:
    return (x * _weights_like(x)).sum()


def _logits_gradient(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """The user's own loss on training logits (DPO, distillation)."""

    def run(one: nn.Module) -> list[Tensor]:
        logits = one(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        value = _weighted(logits.log_softmax(-1))
        value.backward()
        return [logits, value]

    _backward_of(report, model, parallel, run)


def _kept_logits_gradient(
    report: Report, model: nn.Module, parallel: nn.Module, batch: Batch
) -> None:
    """logits_to_keep as a number and as indices, and the gradient through them."""
    for keep in (1, 3, torch.tensor([0, 5, 16])):

        def run(one: nn.Module, keep: int | Tensor = keep) -> list[Tensor]:
            one.zero_grad(set_to_none=True)
            logits = one(input_ids=batch["input_ids"], logits_to_keep=keep).logits
            _weighted(logits).backward()
            return [logits]

        _backward_of(report, model, parallel, run)


def _loss_and_logits(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """Logits in eval mode with gradients: a loss of both the model's loss and its logits."""

    def run(one: nn.Module) -> list[Tensor]:
        one.eval()
        out = one(**fresh(batch))
        one.train()
        value = out.loss + 0.1 * _weighted(out.logits)
        value.backward()
        return [out.loss, out.logits]

    _backward_of(report, model, parallel, run)


def _hidden_states(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """Every recorded hidden state, whole, and a loss on all of them."""

    def run(one: nn.Module) -> list[Tensor]:
        out = one(**fresh(batch), output_hidden_states=True)
        (out.loss + sum(0.01 * _weighted(h) for h in out.hidden_states)).backward()
        return [out.loss, *out.hidden_states]

    _backward_of(report, model, parallel, run)


def _hidden_states_eval(
    report: Report, model: nn.Module, parallel: nn.Module, batch: Batch
) -> None:
    with evaluating(model, parallel):
        got, want = (one(**fresh(batch), output_hidden_states=True) for one in (parallel, model))
    if len(got.hidden_states) != len(want.hidden_states):
        report.problems.append(
            f"{len(got.hidden_states)} hidden states, want {len(want.hidden_states)}"
        )
    for index, (one, other) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        compare_plain(report, f"hidden state {index}", one, other)
    compare_plain(report, "logits", got.logits, want.logits)


def _attentions(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    with evaluating(model, parallel):
        got, want = (one(**fresh(batch), output_attentions=True) for one in (parallel, model))
    for index, (one, other) in enumerate(zip(got.attentions, want.attentions, strict=True)):
        compare_plain(report, f"attention {index}", one, other)


def _decoder_alone(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """`model.model(...)`, and a loss on its last hidden state (value heads, reward models)."""

    def run(one: nn.Module) -> list[Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = one.model(input_ids=ids, attention_mask=mask).last_hidden_state
        _weighted(hidden).backward()
        return [hidden]

    _backward_of(report, model, parallel, run)


def _head_by_hand(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """The head called on the decoder's output, outside the model: TRL's chunked losses."""

    def run(one: nn.Module) -> list[Tensor]:
        hidden = one.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        logits = one.lm_head(hidden[:, 3:])
        _weighted(logits).backward()
        return [logits]

    _backward_of(report, model, parallel, run)


def _retain_graph(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """Two backwards of one graph: twice the gradient."""

    def twice(output: Any) -> None:
        output.loss.backward(retain_graph=True)
        output.loss.backward()

    compare_once(report, model, parallel, batch, backward=twice)
    once = {name: gradient / 2 for name, gradient in gradients(parallel).items()}
    parallel.zero_grad(set_to_none=True)
    parallel(**fresh(batch)).loss.backward()
    compare_gradients(report, gradients(parallel), once, "half of two: ")


def _two_forwards(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """Two graphs alive at a time, of different lengths, backward in either order."""
    other = batches.plain(3, 7, model.config.vocab_size)
    for order in ("sum", "first first", "last first"):

        def run(one: nn.Module, order: str = order) -> list[Tensor]:
            one.zero_grad(set_to_none=True)
            first, second = one(**fresh(batch)).loss, one(**fresh(other)).loss
            if order == "sum":
                (first + second).backward()
            else:
                for loss in (first, second) if order == "first first" else (second, first):
                    loss.backward()
            return [first.detach(), second.detach()]

        _backward_of(report, model, parallel, run)


def _no_grad_between(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """Forwards without gradients, of other lengths, between a forward and its backward."""
    vocab = model.config.vocab_size
    short, other = batches.with_num_items(batches.plain(2, 7, vocab), 5), batches.plain(1, 1, vocab)

    def run(one: nn.Module) -> list[Tensor]:
        loss = one(**fresh(batch)).loss
        with torch.no_grad():
            between = one(**fresh(short)).loss
        one.eval()
        with torch.no_grad():
            logits = one(input_ids=other["input_ids"]).logits
        one.train()
        loss.backward()
        return [loss.detach(), between, logits]

    _backward_of(report, model, parallel, run)


def _checkpointed_two_forwards(
    report: Report, model: nn.Module, parallel: nn.Module, batch: Batch
) -> None:
    """Layers recomputed in backward after another forward, of another length, has run."""
    for one in (model, parallel):
        one.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        _two_forwards(report, model, parallel, batch)
        _no_grad_between(report, model, parallel, batch)
    finally:
        for one in (model, parallel):
            one.gradient_checkpointing_disable()


def _tuple_and_positional(
    report: Report, model: nn.Module, parallel: nn.Module, batch: Batch
) -> None:
    """return_dict=False, and ids as a positional argument."""
    with evaluating(model, parallel):
        got, want = (
            one(batch["input_ids"], labels=batch["labels"], return_dict=False)
            for one in (parallel, model)
        )
        report.compare("loss of tuple", got[0], want[0])
        compare_plain(report, "logits of tuple", got[1], want[1])
    got, want = (
        one(batch["input_ids"], labels=batch["labels"], return_dict=False)[0]
        for one in (parallel, model)
    )
    report.compare("training loss of tuple", got, want)


def _scaled_loss(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """The upstream gradient of the loss is not 1 (accumulation, loss scaling).

    The loss makes its own early.
    """
    compare_once(
        report, model, parallel, batch, backward=lambda output: (output.loss / 3 * 1024).backward()
    )


def _grads_by_autograd(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """torch.autograd.grad for one input only: nothing is accumulated into parameters."""
    embedded = batches.with_inputs_embeds(batch)
    found = []
    for one in (model, parallel):
        inputs = fresh(embedded)
        found.append(torch.autograd.grad(one(**inputs).loss, inputs["inputs_embeds"])[0])
        if any(p.grad is not None for p in one.parameters()):
            report.problems.append("autograd.grad filled .grad")
    report.compare("grad inputs_embeds", found[1], found[0])


USES = {
    "logits-gradient": _logits_gradient,
    "logits-to-keep": _kept_logits_gradient,
    "loss-and-logits": _loss_and_logits,
    "hidden-states": _hidden_states,
    "hidden-states-eval": _hidden_states_eval,
    "attentions": _attentions,
    "decoder-alone": _decoder_alone,
    "head-by-hand": _head_by_hand,
    "retain-graph": _retain_graph,
    "two-forwards": _two_forwards,
    "no-grad-between": _no_grad_between,
    "checkpointed-two-forwards": _checkpointed_two_forwards,
    "tuple-and-positional": _tuple_and_positional,
    "scaled-loss": _scaled_loss,
    "autograd-grad": _grads_by_autograd,
}


def frozen(case: Case, patterns: Iterable[str]) -> dict[str, Report]:
    """Only parameters whose name contains the pattern train, as set before `parallelize`."""
    from hf_sp import parallelize

    def run(report: Report, pattern: str) -> None:
        model = tiny.build(case.family)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(pattern in name)
        parallel = parallelize(copy.deepcopy(model), tp=dist.get_world_size(), sp=case.sp)
        want, got = (
            [name for name, p in one.named_parameters() if p.requires_grad]
            for one in (model, parallel)
        )
        if got != want or not want:
            report.problems.append(f"trainable: {got}, want {want}")
        batch = batches.left_padded(2, 17, model.config.vocab_size)
        compare_once(report, tiny.reference(model), parallel, batch)

    return each(case, patterns, run)


def different_batches(case: Case) -> str:
    """What happens when a tp rank is given another batch than its peers.

    Must be an error on every rank.
    """
    _, parallel = pair(case)
    batch = batches.plain(2, 16, parallel.config.vocab_size, seed=dist.get_rank())
    try:
        parallel(**batch)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
