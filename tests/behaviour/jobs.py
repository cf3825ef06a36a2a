"""Rank functions: uses beyond the parity matrix."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from harness import batches, tiny
from harness.compare import compare_gradients, compare_loss, gradients, whole
from harness.parity import Case, pair
from harness.report import Report
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_sp import grad_norm, parallel_state, parallelize


def _report(name: str) -> Report:
    return Report(name, dist.get_rank(), "float64")


def classifier(kind: str, sp: bool) -> Report:
    """A model without an LM head: the classifier is replicated, on the gathered hidden states."""
    auto = {
        "sequence": AutoModelForSequenceClassification,
        "token": AutoModelForTokenClassification,
    }[kind]
    torch.manual_seed(0)
    config = tiny.config("llama", num_labels=3, pad_token_id=0, classifier_dropout=0.0)
    model = auto.from_config(config, dtype=torch.float64).train()
    parallel = parallelize(copy.deepcopy(model), sp=sp)
    # 17 tokens: tp divides neither; labels of the kind's shape.
    batch = batches.plain(2, 17)
    shape = (2,) if kind == "sequence" else (2, 17)
    batch["labels"] = (
        torch.arange(2 * 17).reshape(2, 17)[:, : shape[-1] if len(shape) > 1 else 1] % 3
    )
    batch["labels"] = batch["labels"].reshape(shape)
    report = _report(f"{kind} classifier")
    for one in (model, parallel):
        one(**batch).loss.backward()
    # transformers computes this loss in the logits' own dtype.
    compare_loss(report, parallel(**batch).loss, model(**batch).loss)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report


def norm_of_gradients(family: str, ep: int) -> Report:
    """As of the unsharded model and a head of one's own, for norms of three kinds."""
    model, parallel = pair(Case(family, parallelize=(("ep", ep),)))
    report, norms = _report(f"{family} {ep=}"), []
    for one, measure in ((model, nn.utils.get_total_norm), (parallel, grad_norm)):
        value = nn.Linear(64, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(value.weight, 0.1)
        output = one(input_ids=batches.plain(2, 17)["input_ids"], output_hidden_states=True)
        (output.logits.square().mean() + value(output.hidden_states[-1]).square().mean()).backward()
        found = [*one.parameters(), *value.parameters()]
        given = found if one is parallel else [p.grad for p in found if p.grad is not None]
        norms.append([measure(given, kind) for kind in (2.0, 1.0, float("inf"))])
    for number, (want, got) in enumerate(zip(*norms, strict=True)):
        report.compare(f"norm {number}", got, want)
    clipped = nn.utils.clip_grad_norm_(parallel.parameters(), 1e9)
    report.compare("as clipping", grad_norm(parallel), clipped.detach())
    return report


def data_written() -> dict[str, list[str]]:
    """Names of weights that are not as in one process after each way to give them other data."""

    def exchanged(parameters: list[nn.Parameter]) -> None:
        kept = [p.detach().clone() * 1.5 for p in parameters]
        for p, other in zip(parameters, kept, strict=True):
            p.data, other.data = other.data, p.data
        assert all(
            torch.equal(whole(p), 1.5 * whole(o)) for p, o in zip(parameters, kept, strict=True)
        )

    def from_vector(parameters: list[nn.Parameter]) -> None:
        vector = nn.utils.parameters_to_vector(parameters) * 1.5
        nn.utils.vector_to_parameters(vector, parameters)

    def rows(p: nn.Parameter) -> Tensor:
        tensor = whole(p).clone()
        tensor[1:3].zero_()
        return tensor

    def each(write: Any) -> Any:
        return lambda parameters: [setattr(p, "data", write(p)) for p in parameters]

    ways = {
        "scaled": each(lambda p: p.data * 1.5),
        "cast": each(lambda p: p.data.float()),
        "whole": each(lambda p: torch.full(p.shape, 0.5, dtype=p.dtype)),
        "rows": each(rows),
        "exchanged": exchanged,
        "from a vector": from_vector,
    }
    wrong = {}
    for name, write in ways.items():
        # torch cannot make a vector of packed experts' shards, and says so.
        model, parallel = pair(Case("llama_tied" if name == "from a vector" else "qwen3_moe"))
        for one in (model, parallel):
            with torch.no_grad():
                write(list(one.parameters()))
        pairs = zip(model.named_parameters(), parallel.parameters(), strict=True)
        wrong[name] = [
            n
            for (n, p), q in pairs
            if p.dtype != q.to_local().dtype or not torch.equal(p, whole(q))
        ]
    return wrong


def initialised_again(**options: Any) -> list[str]:
    """Names of weights that are not one process's, after transformers has drawn them again."""
    model, parallel = pair(Case("qwen3_moe", parallelize=tuple(options.items())))
    wrong = []
    for seed in (3, 50 + dist.get_rank()):
        for one, number in ((model, 3 if seed == 3 else 50), (parallel, seed)):
            torch.manual_seed(number)
            one.apply(one._init_weights)
        pairs = zip(model.named_parameters(), parallel.parameters(), strict=True)
        wrong += [f"{seed} {n}" for (n, p), q in pairs if not torch.equal(p, whole(q))]
    return wrong


def kin(model_type: str, **config: Any) -> Report:
    """A family outside the matrix, derived by the same rules: one step's gradients."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **config,
    }
    made = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float64).train()
    parallel = parallelize(copy.deepcopy(model))
    batch = batches.plain(2, 17)
    report = _report(model_type)
    tiny.reference(model)
    for one in (model, parallel):
        one(**batch).loss.backward()
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report


def world_of_one(sp: bool) -> Report:
    """The same script on one rank."""
    model, parallel = pair(Case("llama_odd_vocab", sp=sp))
    batch = batches.left_padded(2, 17, 61)
    report = _report("world of one")
    for one in (model, parallel):
        compare = one(**batch)
        compare.loss.backward()
    compare_gradients(report, gradients(parallel, report), gradients(model))
    model.eval(), parallel.eval()
    prompt = batch["input_ids"][:, -5:]
    tokens = [m.generate(prompt, max_new_tokens=6, do_sample=False) for m in (model, parallel)]
    if not torch.equal(*tokens):
        report.problems.append("generates other tokens")
    return report


def embedding_noise() -> Report:
    """A hook on the embedding that adds noise (Trainer's NEFTune), the same on all ranks."""

    def noise(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return output + torch.randn(output.shape, generator=generator, dtype=output.dtype)

    model, parallel = pair(Case("llama"))
    batch = batches.plain(2, 17)
    report = _report("noise on the embedding")
    for one in (model, parallel):
        one.get_input_embeddings().register_forward_hook(noise)
        one(**batch).loss.backward()
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report


def own_loss_function() -> Report:
    """A loss function of the user's is given whole logits; one set before parallelize stays."""

    def smoothed(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        return nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1), label_smoothing=0.1
        )

    batch = batches.plain(2, 17)
    report = _report("own loss function")
    for before in (True, False):
        model = tiny.build("llama_odd_vocab")
        parallel = copy.deepcopy(model)
        if before:
            parallel.loss_function = smoothed
        parallel = parallelize(parallel)
        if not before:
            parallel.loss_function = smoothed
        model.loss_function = smoothed
        batch = batches.plain(2, 17, 61)
        for one in (model, parallel):
            one(**batch).loss.backward()
        compare_gradients(report, gradients(parallel, report), gradients(model), f"{before} ")
    return report


def loss_options(chunk: int, **options: Any) -> Report:
    """Options of ForCausalLMLoss, and chunks smaller than the batch."""
    model, parallel = pair(Case("llama_odd_vocab", parallelize=(("loss_chunk", chunk),)))
    batch = {**batches.plain(2, 17, 61), **options}
    batch["labels"][0, 3:9] = options.get("ignore_index", -100)
    report = _report(f"loss options {options}")
    for one in (model, parallel):
        loss = one(**batch).loss
        (loss * 3).backward()
    compare_loss(report, parallel(**batch).loss, model(**batch).loss)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report


def half_precision_loss() -> dict[str, float]:
    """float16 under a large loss scale: relative error of the head's gradient against float64.

    Gradients of a mean over many tokens are below float16's smallest number before they are
    scaled up again.
    """
    torch.manual_seed(0)
    config = tiny.config("llama", vocab_size=512)
    truth = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    half = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    half.load_state_dict(truth.state_dict())
    truth.load_state_dict(half.state_dict())
    tiny.reference(truth)
    parallel = parallelize(copy.deepcopy(half))
    batch = batches.plain(4, 64, 512)
    # As Trainer's accumulation over many tokens divides: by far more than this batch has.
    batch["num_items_in_batch"] = torch.tensor(2.0**20)
    scale = 2.0**16
    errors = {}
    for name, one in (("unsharded", half), ("parallel", parallel)):
        truth.zero_grad()
        truth(**batch).loss.backward()
        want = truth.lm_head.weight.grad
        (one(**batch).loss * scale).backward()
        got = whole(one.lm_head.weight.grad).double() / scale
        errors[name] = float((got - want).norm() / want.norm())
    return errors


def attention_dropout(checkpoint: bool) -> dict[str, Any]:
    """Dropout in attention: replayed by a recompute, another on each rank, the stream shared."""
    model = tiny.build("llama", attention_dropout=0.5, attn="eager")
    model = parallelize(model)
    batch = batches.plain(2, 17)

    def step() -> tuple[Tensor, dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        loss = model(**batch).loss
        after = torch.rand(4)
        loss.backward()
        return loss.detach(), gradients(model), after

    loss, grads, after = step()
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    again, regrads, _ = step()
    torch.manual_seed(4)
    other = model(**batch).loss
    masks: list = [None] * dist.get_world_size()
    seen = []
    model.gradient_checkpointing_disable()
    torch.manual_seed(3)
    attention = model.model.layers[0].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda m, args: seen.append(torch.rand(3)))
    model(**batch)
    handle.remove()
    dist.all_gather_object(masks, [float(x) for x in seen[0]])
    shared: list = [None] * dist.get_world_size()
    dist.all_gather_object(shared, [float(x) for x in after])
    return {
        "replayed": bool(loss == again) and all(torch.equal(grads[n], regrads[n]) for n in grads),
        "random": bool(other != loss),
        "ranks differ inside": len({tuple(m) for m in masks}) == len(masks),
        "stream shared outside": all(s == shared[0] for s in shared),
        "eval is deterministic": _eval_equal(model, batch),
    }


def _eval_equal(model: nn.Module, batch: dict[str, Tensor]) -> bool:
    model.eval()
    with torch.no_grad():
        return bool(model(**batch).loss == model(**batch).loss)


def no_logits() -> tuple[bool, bool, bool]:
    """Eval with labels makes logits unless told that nobody reads them."""
    model = parallelize(tiny.build("llama_odd_vocab")).eval()
    batch = batches.plain(2, 17, 61)
    state = parallel_state(model)
    assert state is not None
    with torch.no_grad():
        usual = model(**batch).logits
        with state.no_logits():
            without = model(**batch)
            inside = model(input_ids=batch["input_ids"]).logits
    return tuple(usual.shape) == (2, 17, 61), without.logits is None, inside is not None


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"fused": True},
    "Adam": {"foreach": True, "amsgrad": True},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"centered": True},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "ASGD": {},
}


def optimizers() -> list[Report]:
    """Three steps of each on shards, some of which are uneven, and on whole weights."""
    batch = batches.plain(2, 17, 61)
    reports = []
    for name, options in OPTIMIZERS.items():
        report = _report(name)
        model, parallel = pair(Case("llama_odd_vocab"))
        for one in (model, parallel):
            # The default of 1.0 is Adadelta's own.
            rate = {} if name == "Adadelta" else {"lr": 1e-2}
            optimizer = getattr(torch.optim, name)(one.parameters(), **rate, **options)
            for _ in range(3):
                optimizer.zero_grad()
                one(input_ids=batch["input_ids"]).logits.logsumexp(-1).mean().backward()
                optimizer.step()
        for key, p in model.named_parameters():
            report.compare(key, whole(parallel.get_parameter(key)), p)
        reports.append(report)
    return reports
