"""Rank functions for the loss: models that scale or cap their logits, and the functions alone."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import batches, tiny
from harness.compare import compare_gradients, compare_loss, compare_plain, evaluating, gradients
from harness.parity import Case, pair
from harness.report import Report
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_sp import parallel_state, parallelize
from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.errors import ShapeError
from hf_sp.kernels import vocab_parallel_cross_entropy
from hf_sp.kernels.cross_entropy_steps import LossTerms
from hf_sp.kernels.vocab import vocab_range, vocab_sizes
from hf_sp.model.chunks import HeadSpec
from hf_sp.model.lazy import LazyLogits
from hf_sp.model.loss import linear_cross_entropy


@contextlib.contextmanager
def no_whole_tensors() -> Iterator[None]:
    """Whoever makes whole logits or gathers whole hidden states fails."""

    def refuse(*args: Any) -> Any:
        raise AssertionError("a whole tensor was made")

    with (
        mock.patch.object(pairs, "concat_slice", refuse),
        mock.patch.object(pairs, "allgather_scatter", refuse),
    ):
        yield


def scaled_logits(family: str, sp: bool) -> Report:
    """A family that scales or caps its logits: one step without them, and its logits in eval."""
    model, parallel = pair(Case(family, sp=sp, attn="eager", parallelize=(("loss_chunk", 16),)))
    # No padding: Gemma's eager attention makes NaN of rows that see nothing.
    batch = batches.plain(2, 17, model.config.vocab_size)
    batch["labels"][0, 3:9] = -100
    report = Report(f"{family} sp={sp}", dist.get_rank(), "float64")
    want = model(**batch).loss
    assert want.isfinite()
    want.backward()
    with no_whole_tensors():
        got = parallel(**batch).loss
        got.backward()
    compare_loss(report, got, want)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    with evaluating(model, parallel):
        one, other = (m(**batch) for m in (parallel, model))
    compare_loss(report, one.loss, other.loss)
    compare_plain(report, "logits", one.logits, other.logits)
    return report


def linear(sp: bool, vocab: int, length: int, chunk: int, options: dict[str, Any]) -> Report:
    """The chunked form against torch's cross entropy of the whole logits."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    axis = comm.Axis.of(mesh)
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((3, length, 8), (vocab, 8), (vocab,))
    )
    labels = torch.randint(0, vocab, (3, length), generator=g)
    labels[1, 2:] = options.get("ignore_index", -100)
    form = dict(options)
    scale, cap = form.pop("scale", 1.0), form.pop("softcap", None)
    z = (hidden @ weight.t() + bias) * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    want = nn.functional.cross_entropy(z.flatten(0, 1), labels.flatten(), reduction="sum", **form)
    (want * 3).backward()

    start, stop = vocab_range(vocab, axis)
    mine = (comm.own_shard(hidden.detach(), axis) if sp else hidden.detach()).requires_grad_()
    rows = weight.detach()[start:stop].clone().requires_grad_()
    own_bias = bias.detach()[start:stop].clone().requires_grad_()
    ignored = options.get("ignore_index", -100)
    terms = LossTerms(vocab=vocab, start=start, ignore_index=ignored, softcap=cap, scale=scale)
    got = linear_cross_entropy(mine, rows, own_bias, labels, HeadSpec(terms, axis, sp, chunk))
    (got * 3).backward()
    report = Report(f"linear {options}", axis.rank, "float64")
    compare_loss(report, got, want)
    dhidden = comm.own_shard(hidden.grad, axis) if sp else hidden.grad
    report.compare("hidden", mine.grad, dhidden)
    report.compare("weight", rows.grad, weight.grad[start:stop])
    report.compare("bias", own_bias.grad, bias.grad[start:stop])
    return report


def every_kind_of_group(vocab: int) -> Report:
    """The group as a mesh, a process group, its name and an Axis; sizes given or asked for."""
    world = dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    group = mesh.get_group()
    axis = comm.Axis.of(mesh)
    report = Report(f"groups {vocab}", axis.rank, "float64")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(5, vocab, generator=g, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, vocab, (5,), generator=g)
    want = nn.functional.cross_entropy(x, labels)
    want.backward()
    split = vocab_sizes(vocab, axis)
    # The same columns in another split: all but one of them on the last rank.
    uneven = [(r, r + 1) for r in range(world - 1)] + [(world - 1, vocab)]
    for name, kind, (start, stop), sizes in (
        ("mesh", mesh, vocab_range(vocab, axis), {"vocab_size": vocab}),
        ("process group", group, vocab_range(vocab, axis), {}),
        ("name", group.group_name, vocab_range(vocab, axis), {"vocab_size": vocab}),
        ("axis", axis, uneven[axis.rank], {"vocab_size": vocab, "vocab_start": axis.rank}),
        ("axis asks", axis, uneven[axis.rank], {}),
    ):
        part = x.detach()[:, start:stop].clone().requires_grad_()
        got = vocab_parallel_cross_entropy(part, labels, kind, reduction="mean", **sizes)
        got.backward()
        compare_loss(report, got, want, f"{name} ")
        report.compare(name, part.grad, x.grad[:, start:stop])
    assert split[axis.rank] == vocab_range(vocab, axis)[1] - vocab_range(vocab, axis)[0]
    return report


# --- who meets the final hidden states -----------------------------------------------------------


def _note(seen: list[Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(getattr(output, "last_hidden_state", output))

    return hook


WATCHERS = {
    "norm": lambda m, seen: m.model.norm.register_forward_hook(_note(seen)),
    "decoder": lambda m, seen: m.model.register_forward_hook(_note(seen)),
    "head's input": lambda m, seen: m.lm_head.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    ),
    "head": lambda m, seen: m.lm_head.register_forward_hook(
        lambda module, args, output: seen.append(args[0])
    ),
    "gradient of the norm": lambda m, seen: m.model.norm.register_full_backward_hook(
        lambda module, into, out: seen.append(out[0])
    ),
}


def watched(name: str) -> Report:
    """Hooks on what surrounds the final hidden states see whole, real tensors."""
    model, parallel = pair(Case("llama_odd_vocab"))
    batch = batches.plain(2, 17, 61)
    report = Report(f"watched by {name}", dist.get_rank(), "float64")
    seen: dict[str, list[Tensor]] = {"want": [], "got": []}
    for one, key in ((model, "want"), (parallel, "got")):
        handle = WATCHERS[name](one, seen[key])
        one(**batch).loss.backward()
        handle.remove()
    if len(seen["got"]) != 1 or len(seen["want"]) != 1:
        report.problems.append(f"seen {len(seen['got'])}, want {len(seen['want'])}")
        return report
    compare_plain(report, "seen", seen["got"][0], seen["want"][0])
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report


def _returns_hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward of the user's class that hands the decoder's result on."""
    outputs = self.model(input_ids=kwargs["input_ids"])
    hidden = outputs.last_hidden_state
    logits = self.lm_head(hidden[:, slice(0, None), :])
    outputs["loss"] = self.loss_function(logits, kwargs["labels"], self.vocab_size)
    return outputs


def _writes_hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward that changes the hidden states before the head."""
    outputs = self.model(input_ids=kwargs["input_ids"])
    hidden = outputs.last_hidden_state
    hidden *= 1.5
    outputs["loss"] = self.loss_function(
        self.lm_head(outputs.last_hidden_state), kwargs["labels"], self.vocab_size
    )
    return outputs


def _tanh_in_the_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Two caps are none that the loss knows: whole logits, by the model's own operations."""
    outputs = self.model(input_ids=kwargs["input_ids"])
    logits = torch.tanh(2 * torch.tanh(self.lm_head(outputs.last_hidden_state) / 3.0)) * 2
    outputs["loss"] = self.loss_function(logits, kwargs["labels"], self.vocab_size)
    return outputs


def _copies_hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Deep copies and pickles are of the whole tensor."""
    outputs = self.model(input_ids=kwargs["input_ids"])
    with torch.no_grad():
        leaf = outputs.last_hidden_state.detach()
        if not torch.equal(copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
            raise AssertionError
    logits = self.lm_head(outputs.last_hidden_state)
    outputs["loss"] = self.loss_function(logits, kwargs["labels"], self.vocab_size)
    return outputs


def _peeks_at_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Touches the logits where nothing is recorded, before they are used for the loss."""
    outputs = self.model(input_ids=kwargs["input_ids"])
    logits = self.lm_head(outputs.last_hidden_state) * 0.5
    with torch.no_grad():
        logits.argmax(-1)
    outputs["loss"] = self.loss_function(logits, kwargs["labels"], self.vocab_size)
    return outputs


FORWARDS = {
    "returns it": _returns_hidden,
    "writes into it": _writes_hidden,
    "caps twice": _tanh_in_the_loss,
    "copies it": _copies_hidden,
    "peeks at the logits": _peeks_at_logits,
}


def own_forward(name: str) -> Report:
    """A model class with a forward of its own around the decoder and the head."""
    model, parallel = pair(Case("llama_odd_vocab"))
    batch = batches.plain(2, 17, 61)
    report = Report(f"forward that {name}", dist.get_rank(), "float64")
    outputs = []
    for one in (model, parallel):
        own = type("Own", (type(one),), {"forward": FORWARDS[name]})
        one.__class__ = own
        output = one(**batch)
        (output.loss + 0.01 * output.last_hidden_state.square().mean()).backward()
        outputs.append(output)
    want, got = outputs
    if any(isinstance(x, LazyLogits) for x in got.values()):
        report.problems.append(f"a stand-in was handed out: {got}")
    # transformers' own loss, which the caps go to, rounds to float32.
    if got.loss.dtype == want.loss.dtype:
        compare_loss(report, got.loss, want.loss)
    compare_plain(report, "last_hidden_state", got.last_hidden_state, want.last_hidden_state)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report


def touched_logits() -> Report:
    """Logits that someone needs after all, where the head was handed the shard."""
    model, parallel = pair(Case("llama_odd_vocab"))
    batch = batches.plain(2, 17, 61)
    report = Report("touched logits", dist.get_rank(), "float64")
    model(**batch).loss.backward()
    parallel.loss_function.original = tiny.float64_loss
    with (
        mock.patch.object(LazyLogits, "scale_and_softcap", return_value=None),
        mock.patch.object(pairs, "allgather_scatter", None),
    ):
        parallel(**batch).loss.backward()
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report


def sliced_shard() -> str:
    """Something between the final norm and the head that hf_sp does not see cuts the sequence."""
    model = parallelize(tiny.build("llama_odd_vocab"))
    right = type(model.lm_head).forward
    with mock.patch.object(type(model.lm_head), "forward", lambda self, x: right(self, x[:, 1:])):
        try:
            model(**batches.plain(2, 17, 61))
        except ShapeError as error:
            return str(error)
    return ""


def lazy_where_it_should_be() -> dict[str, bool]:
    """Which forwards leave the final hidden states' shard to the loss."""
    model = parallelize(tiny.build("llama_odd_vocab"))
    state = parallel_state(model)
    batch = batches.plain(2, 17, 61)
    ids = {"input_ids": batch["input_ids"]}
    seen: list[bool] = []
    right = type(model.lm_head).forward

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append(state.final_length == 17)
        if x.shape[1] != (9 if seen[-1] else 17):
            raise AssertionError(x.shape)
        return right(self, x)

    facts = {}
    with mock.patch.object(type(model.lm_head), "forward", forward):
        model(**batch)
        facts["training"] = seen.pop()
        with torch.no_grad():
            model(**batch)
        facts["training without grad"] = seen.pop()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**batch)
        facts["autocast"] = seen.pop()
        model(**batch, logits_to_keep=0, return_dict=False)
        facts["tuple"] = seen.pop()
        model(**ids)
        facts["not without labels"] = not seen.pop()
        model(**batch, output_hidden_states=True)
        facts["not with hidden states"] = not seen.pop()
        model.config.output_hidden_states = True
        model(**batch)
        facts["not with hidden states by the config"] = not seen.pop()
        model.config.output_hidden_states = False
        model(**batch, logits_to_keep=torch.arange(17))
        facts["not with chosen positions"] = not seen.pop()
        handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
        model(**batch)
        handle.remove()
        facts["not under hooks on every module"] = not seen.pop()
        model.eval()
        model(**batch)
        facts["not in eval"] = not seen.pop()
        with state.no_logits():
            model(**batch)
        facts["eval without logits"] = seen.pop()
        model.train()
        state.keep_logits = True
        model(**batch)
        facts["not with kept logits"] = not seen.pop()
        state.keep_logits = False
        model.loss_function = tiny.float64_loss
        model(**batch)
        facts["not for another loss"] = not seen.pop()
    facts["off outside"] = (state.final_hidden, state.final_length, state.in_model) == (
        "gathered",
        None,
        False,
    )
    return facts


def half_precision(autocast: bool) -> dict[str, float]:
    """bfloat16: relative error of the head's and the trunk's gradient against float64."""
    torch.manual_seed(0)
    truth = tiny.build("llama_odd_vocab")
    half = AutoModelForCausalLM.from_config(
        tiny.config("llama_odd_vocab"), dtype=torch.float32 if autocast else torch.bfloat16
    )
    half.load_state_dict(truth.state_dict())
    truth.load_state_dict(half.state_dict())
    tiny.reference(truth)
    parallel = parallelize(copy.deepcopy(half.train()), loss_chunk=16)
    batch = batches.plain(4, 33, 61)
    truth(**batch).loss.backward()
    errors = {}
    for key, one in (("unsharded", half), ("parallel", parallel)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = one(**batch).loss
        loss.backward()
        for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
            want = truth.get_parameter(name).grad
            got = gradients(one)[name].double()
            errors[f"{key} {name}"] = float((got - want).norm() / want.norm())
    return errors
