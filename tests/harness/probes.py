"""Rank functions that hold a parallelized model to the unsharded one on one kind of use each.

All return `{name: Report}`; run them on a pool and check with `parity.assert_parity`. Everything is
float64 (judged at 1e-10) but for `noise`, which compares the errors of low precision.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness import batches, tiny
from harness.batches import Batch
from harness.parity import (
    Case,
    Report,
    attempt,
    compare_gradients,
    compare_loss,
    compare_once,
    fresh,
    gradients,
    pair,
    whole,
)

Reports = dict[str, Report]


def input_names(tp: int) -> list[str]:
    """Names of `named_inputs`, for test ids."""
    return list(named_inputs(tp, 96))


def named_inputs(tp: int, vocab: int) -> dict[str, Batch]:
    """Every kind of batch that a user sends."""
    lengths = sorted({1, tp - 1, tp + 1, 7, 16, 17})
    made = {
        f"length{length}-batch{batch}": batches.with_num_items(
            batches.plain(batch, length, vocab), 5
        )
        for length in lengths
        for batch in (1, 2, 3)
    }
    plain, ragged = batches.plain(2, 17, vocab), batches.ignored_runs(3, 7, vocab)
    return made | {
        # No target at all: HF's mean over nothing, a NaN; its gradients are zero.
        "length1-no-target": batches.plain(2, 1, vocab),
        "length1-shift-labels": {
            **batches.plain(2, 1, vocab),
            "shift_labels": batches.tokens(2, 1, vocab, 3),
        },
        "no-labels-counted": {**plain, "labels": torch.full_like(plain["labels"], batches.IGNORE)},
        "left-padded": batches.left_padded(3, 17, vocab),
        "left-padded-without-positions": batches.left_padded_without_positions(3, 16, vocab),
        "right-padded": batches.right_padded(3, 17, vocab),
        "right-padded-num-items": batches.with_num_items(batches.right_padded(2, 7, vocab)),
        "odd-positions": batches.odd_positions(2, 17, vocab),
        "packed": batches.packed((5, 1, 7, 3), vocab),
        "packed-odd": batches.packed((6, 4, 7), vocab),
        "packed-length1-first-and-last": batches.packed((1, 5, 1, 1, 6, 1), vocab),
        "packed-batch2": batches.packed((5, 1, 7, 3), vocab, batch=2),
        "packed-with-cache": {**batches.packed((5, 1, 7, 3), vocab), "use_cache": True},
        "ignored-runs": ragged,
        "only-first-shard": batches.only_labels_of_shard(0, tp, 2, 16, vocab),
        "only-last-shard": batches.only_labels_of_shard(tp - 1, tp, 2, 17, vocab),
        "shard-boundaries": batches.labels_at_shard_boundaries(tp, 2, 16, vocab),
        "shard-boundaries-odd": batches.labels_at_shard_boundaries(tp, 2, 17, vocab),
        "only-last-token": batches.all_ignored_but_last(2, 17, vocab),
        "num-items": batches.with_num_items(ragged),
        "num-items-int": {**ragged, "num_items_in_batch": 11},
        "shift-labels": batches.with_shift_labels(ragged),
        "shift-labels-num-items": batches.with_num_items(batches.with_shift_labels(plain)),
        "inputs-embeds": batches.with_inputs_embeds(plain),
        "inputs-embeds-padded": batches.with_inputs_embeds(batches.left_padded(3, 7, vocab)),
        "mask-4d": batches.mask_4d(2, 17, vocab),
    }  # fmt: skip


def inputs(case: Case) -> Reports:
    """Each batch.

    Train mode (loss, all gradients), then eval with and without labels (loss, logits).
    """
    model, parallel = pair(case)
    made = named_inputs(dist.get_world_size(), model.config.vocab_size)

    def run(report: Report, name: str) -> None:
        compare_once(report, model, parallel, made[name])
        with _evaluating(model, parallel):
            _compare_eval(report, model, parallel, made[name])

    return _each(case, made, run)


def _compare_eval(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    got, want = parallel(**fresh(batch)), model(**fresh(batch))
    compare_loss(report, got.loss, want.loss, "eval ")
    _compare_plain(report, "eval logits", got.logits, want.logits)
    unlabelled = {
        k: v for k, v in batch.items() if k not in ("labels", "shift_labels", "num_items_in_batch")
    }
    got, want = parallel(**fresh(unlabelled)), model(**fresh(unlabelled))
    if got.loss is not None:
        report.problems.append("a loss without labels")
    _compare_plain(report, "logits without labels", got.logits, want.logits)


def _compare_plain(report: Report, what: str, got: Tensor | None, want: Tensor) -> None:
    if type(got) is not Tensor:
        report.problems.append(f"{what}: {type(got).__name__}, want a plain tensor")
        return
    report.compare(what, got, want)


# -------------------------------------------------------------------------------------------------
# Ways to call the model and to use what it returns
# -------------------------------------------------------------------------------------------------


def uses(case: Case) -> Reports:
    """Each probe in USES, on fresh gradients of one pair of models."""
    model, parallel = pair(case)
    # HF returns attention weights with eager attention only.
    names = [name for name in USES if name != "attentions" or case.attn == "eager"]

    def run(report: Report, name: str) -> None:
        for one in (model, parallel):
            one.train().zero_grad(set_to_none=True)
        USES[name](report, model, parallel, batches.left_padded(2, 17, model.config.vocab_size))

    return _each(case, names, run)


def _backward_of(report: Report, model: nn.Module, parallel: nn.Module, run: Any) -> None:
    """`run(model)` returns scalars it has called backward on, or not.

    Their values and all gradients must agree.
    """
    want, got = run(model), run(parallel)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        report.compare(f"value {index}", whole(one), other)
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
    with _evaluating(model, parallel):
        got, want = (one(**fresh(batch), output_hidden_states=True) for one in (parallel, model))
    if len(got.hidden_states) != len(want.hidden_states):
        report.problems.append(
            f"{len(got.hidden_states)} hidden states, want {len(want.hidden_states)}"
        )
    for index, (one, other) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        _compare_plain(report, f"hidden state {index}", one, other)
    _compare_plain(report, "logits", got.logits, want.logits)


def _attentions(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    with _evaluating(model, parallel):
        got, want = (one(**fresh(batch), output_attentions=True) for one in (parallel, model))
    for index, (one, other) in enumerate(zip(got.attentions, want.attentions, strict=True)):
        _compare_plain(report, f"attention {index}", one, other)


def _decoder_alone(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """`model.model(...)`, and a loss on its last hidden state (value heads, reward models)."""

    def run(one: nn.Module) -> list[Tensor]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = one.model(input_ids=ids, attention_mask=mask).last_hidden_state
        _weighted(hidden).backward()
        return [hidden]

    _backward_of_some(report, model, parallel, run)


def _backward_of_some(report: Report, model: nn.Module, parallel: nn.Module, run: Any) -> None:
    """As `_backward_of`, where the head takes no part.

    Its gradient is None in HF and may be so here.
    """
    want, got = run(model), run(parallel)
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        _compare_plain(report, f"value {index}", one, other)
    compare_gradients(report, gradients(parallel, report), gradients(model))


def _head_by_hand(report: Report, model: nn.Module, parallel: nn.Module, batch: Batch) -> None:
    """The head called on the decoder's output, outside the model's forward (TRL's chunked losses).

    He head called on the decoder's output, outside the model's forward (TRL's chunked losses).
    """

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
    with _evaluating(model, parallel):
        got, want = (
            one(batch["input_ids"], labels=batch["labels"], return_dict=False)
            for one in (parallel, model)
        )
        report.compare("loss of tuple", got[0], want[0])
        _compare_plain(report, "logits of tuple", got[1], want[1])
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


def frozen(case: Case, patterns: Iterable[str]) -> Reports:
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

    return _each(case, patterns, run)


def generation(case: Case) -> Reports:
    """Greedy (and beam) tokens equal the unsharded model's, for each kind of prompt."""
    model, parallel = pair(case)
    model.eval()
    parallel.eval()
    vocab = model.config.vocab_size
    prompts: dict[str, tuple[Batch, dict]] = {
        f"length{length}-batch{batch}": (batches.plain(batch, length, vocab), {})
        for length in (1, 5, 8, 17)
        for batch in (1, 3)
    }
    prompts["left-padded"] = (batches.left_padded_without_positions(3, 9, vocab), {})
    prompts["no-cache"] = (batches.plain(3, 5, vocab), {"use_cache": False})
    prompts["beams"] = (batches.plain(2, 5, vocab), {"num_beams": 3})

    def run(report: Report, name: str) -> None:
        prompt, options = prompts[name]
        ids = prompt["input_ids"]
        mask = prompt.get("attention_mask", torch.ones_like(ids))
        # 12 tokens each: past the sliding window, and eos (which one row may meet) must not end the
        # others' rows.
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **options}
        want, got = (
            one.generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
            for one in (model, parallel)
        )
        report.compare("tokens", got, want)
        if int(want[:, ids.shape[1] :].unique().numel()) < 4:
            report.problems.append("the reference repeats itself: no fault would show")

    return _each(case, prompts, run)


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


# -------------------------------------------------------------------------------------------------
# Low precision
# -------------------------------------------------------------------------------------------------


def noise(case: Case, autocast: bool = False) -> dict[str, float]:
    """Gradient and loss error of the parallel and of the unsharded model in bfloat16, both against
    float64.

    The float64 model has the same (rounded) weights. Returns root-sum-square errors over all
    gradients of several batches, relative to the gradients' size, and the largest ratio of the two
    models' errors in one parameter.
    """
    model, parallel = pair(case)
    truth = tiny.reference(tiny.build(case.family, torch.float64, case.seed, case.attn))
    truth.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    squares: dict[str, list[float]] = {}
    losses = [0.0, 0.0]
    report = _report(case, "")
    for seed in range(4):
        batch = batches.left_padded(2, 17, model.config.vocab_size, seed)
        results = []
        for one in (truth, model, parallel):
            one.zero_grad(set_to_none=True)
            context = (
                torch.autocast("cpu", torch.bfloat16)
                if autocast and one is not truth
                else contextlib.nullcontext()
            )
            with context:
                loss = one(**fresh(batch)).loss
            loss.backward()
            results.append((float(loss), gradients(one, report if one is parallel else None)))
        (want, exact), (loss_u, unsharded), (loss_p, sharded) = results
        losses[0] += (loss_u - want) ** 2
        losses[1] += (loss_p - want) ** 2
        for name, gradient in exact.items():
            sums = squares.setdefault(name, [0.0, 0.0, 0.0])
            for index, other in enumerate(
                (torch.zeros_like(gradient), unsharded[name], sharded[name])
            ):
                sums[index] += float((other.double() - gradient).square().sum())
    if report.problems:
        raise AssertionError("\n".join(report.problems))
    # Each parameter counts alike, whatever its gradient's size.
    relative = [(u / size, p / size) for size, u, p in squares.values()]
    return {
        "unsharded": (sum(u for u, _ in relative) / len(relative)) ** 0.5,
        "parallel": (sum(p for _, p in relative) / len(relative)) ** 0.5,
        "worst ratio": max((p / u) ** 0.5 for u, p in relative),
        "loss unsharded": (losses[0] / 4) ** 0.5,
        "loss parallel": (losses[1] / 4) ** 0.5,
    }


def _each(case: Case, names: Iterable[str], run: Callable[[Report, str], None]) -> Reports:
    """`run(report, name)` for each name; an error of one is in its report."""

    def one(name: str) -> Report:
        report = _report(case, name)
        run(report, name)
        return report

    return {name: attempt(f"{case} {name}", lambda name=name: one(name)) for name in names}


def _report(case: Case, name: str) -> Report:
    return Report(f"{case} {name}", dist.get_rank(), case.dtype)


@contextlib.contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model in models:
            model.train()
