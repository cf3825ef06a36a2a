"""Rank functions: uses of mixture-of-experts models beyond their parity matrix."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from behaviour.generation import compare_generation
from harness import batches, tiny
from harness.compare import (
    compare_gradients,
    compare_loss,
    compare_once,
    evaluating,
    fresh,
    gather_objects,
    gradients,
    whole,
)
from harness.noise import noise
from harness.parity import Case, pair
from harness.report import Report
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from hf_sp import parallel_state, parallelize
from hf_sp.checkpoint.optimizer import load_optimizer, save_optimizer


def _report(name: str, dtype: str = "float64") -> Report:
    return Report(name, dist.get_rank(), dtype)


def _case(family: str, ep: int, **kwargs: Any) -> Case:
    return Case(family, parallelize=(("ep", ep),), **kwargs)


def inputs(family: str, ep: int) -> Report:
    """Lengths that tp does not divide, one of them below tp; padding left and right; packing."""
    report = _report(f"{family} ep={ep}")
    model, parallel = pair(_case(family, ep))
    for name, batch in {
        "odd": batches.plain(2, 17),
        "short": batches.plain(3, dist.get_world_size() - 1),
        "one token": batches.plain(2, 1),
        "left": batches.left_padded(3, 15),
        "right": batches.right_padded(2, 19),
        "packed": batches.packed((5, 1, 7, 4)),
        "scaled": {**batches.plain(2, 17), "num_items_in_batch": torch.tensor(70)},
    }.items():
        if name == "one token":
            # No token has a successor: HF's mean over none.
            batch["num_items_in_batch"] = torch.tensor(1)
        want, got = compare_once(report, model, parallel, batch, label=f"{name} ")
        report.compare(f"{name} aux_loss", got.aux_loss.double(), want.aux_loss.double())
        for layer, (one, other) in enumerate(
            zip(got.router_logits, want.router_logits, strict=True)
        ):
            report.compare(f"{name} router logits {layer}", one, other)
    return report


def recomputed(ep: int, kernels: bool, sp: bool) -> Report:
    """Parts of a sparse block under a checkpoint of the user's, inside of the block."""
    way = _case("qwen2_moe", ep, sp=sp)
    way = replace(way, parallelize=(*way.parallelize, ("kernels", kernels)))
    report = _report(f"{way}")
    batch = batches.plain(2, 17)
    for path in ("mlp", "mlp reentrant", "mlp.experts", "mlp.shared_expert"):
        model, parallel = pair(way)
        for one in (model, parallel):
            for layer in one.model.layers:
                module: Any = layer.get_submodule(path.split()[0])
                reentrant = path.endswith("reentrant")
                module.forward = partial(checkpoint, module.forward, use_reentrant=reentrant)
            one(input_ids=batch["input_ids"]).logits.square().mean().backward()
        compare_gradients(report, gradients(parallel, report), gradients(model), f"{path} ")
    return report


def router_logits_alone(family: str, ep: int) -> Report:
    """A loss of the user's own from router logits: its gradient counts once."""
    report = _report(f"{family} ep={ep} router logits")
    model, parallel = pair(_case(family, ep))
    batch = batches.plain(2, 17)

    def backward(output: Any) -> None:
        sum(x.square().mean() for x in output.router_logits).backward()

    for name, loss in (
        ("logits", backward),
        ("aux alone", lambda output: output.aux_loss.backward()),
        ("both", lambda output: (output.loss * 2 + output.router_logits[0].sum()).backward()),
    ):
        for one in (model, parallel):
            one.zero_grad(set_to_none=True)
            loss(one(**fresh(batch)))
        compare_gradients(report, gradients(parallel, report), gradients(model), f"{name} ")
    return report


def skewed(ep: int, expert: int) -> Report:
    """A router that sends every token to `expert` and the next one: most experts get none."""
    report = _report(f"skewed to {expert}, ep={ep}")
    model = tiny.build("qwen3_moe", mlp_only_layers=[], num_experts_per_tok=2)
    with torch.no_grad():
        for layer in model.model.layers:
            # Hidden states have a component along this direction that is far larger than others.
            layer.post_attention_layernorm.weight[0] = 30.0
            weight = layer.mlp.gate.weight
            weight.mul_(0.01)
            weight[:, 0] = 0.0

    def bias(module: nn.Module, args: tuple, output: tuple) -> tuple:
        logits, _, index = output
        # The same choice for every token, with weights that still depend on the router.
        probabilities = logits.softmax(-1)
        chosen = torch.tensor([expert, (expert + 1) % logits.shape[-1]]).expand_as(index)
        values = probabilities.gather(1, chosen)
        return logits, values / values.sum(-1, keepdim=True), chosen.contiguous()

    parallel = parallelize(copy.deepcopy(model), ep=ep)
    tiny.reference(model)
    for one in (model, parallel):
        for layer in one.model.layers:
            layer.mlp.gate.register_forward_hook(bias)
    compare_once(report, model, parallel, batches.plain(2, 17))
    load = parallel_state(parallel).expert_load()
    for path, counts in load.items():
        want = torch.zeros(8, dtype=torch.long)
        want[[expert, (expert + 1) % 8]] = 34
        if not torch.equal(counts, want):
            report.problems.append(f"load of {path}: {counts.tolist()}")
    for name, p in parallel.named_parameters():
        if "experts." in name and p.grad is None:
            report.problems.append(f"{name} has no gradient")
    return report


def load(family: str, ep: int) -> list[tuple[list[int], list[int]]]:
    """Tokens per expert: (counted by hf_sp, counted from the unsharded model's router logits)."""
    model, parallel = pair(_case(family, ep))
    batch = batches.plain(2, 17)
    with evaluating(model, parallel):
        logits = model(**batch, output_router_logits=True).router_logits
        parallel(**batch)
    found = parallel_state(parallel).expert_load()
    wanted = [x.topk(2, -1).indices.flatten().bincount(minlength=x.shape[1]) for x in logits]
    return [(a.tolist(), b.tolist()) for a, b in zip(found.values(), wanted, strict=True)]


# With a cache HF's auxiliary loss fails, in the unsharded model too.
DECODING = {
    "max_new_tokens": 8,
    "min_new_tokens": 8,
    "pad_token_id": 0,
    "output_router_logits": False,
}


def generates(family: str, ep: int, sp: bool = True) -> Report:
    """Greedy decoding with a cache: prompts on shards, then single tokens on whole ones."""
    report = _report(f"{family} ep={ep} generate", "float32")
    options = (("ep", ep),) if ep > 1 else ()
    model, parallel = pair(Case(family, sp=sp, parallelize=options))
    model.eval(), parallel.eval()
    for batch, length in ((1, 1), (3, 9)):
        ids = batches.plain(batch, length)["input_ids"]
        compare_generation(report, model, parallel, ids, **DECODING)
    return report


def jitter(ep: int, checkpoint: bool) -> Report:
    """Noise on the router's and the experts' input: the unsharded model's, given the same noise.

    Where every rank sees all tokens, all draw it alike, however they are seeded. Where tokens
    travel each draws for its own tokens. For the comparison the draw is replaced by one table, or
    each rank's part of it.
    """
    report = _report(f"jitter ep={ep}")
    # tp divides 16: padding would be drawn for, too.
    batch = batches.plain(2, 16)
    case = Case("mixtral", parallelize=(("ep", ep),), model_kwargs=(("router_jitter_noise", 0.3),))
    model, parallel = pair(case)
    if checkpoint:
        parallel.gradient_checkpointing_enable({"use_reentrant": False})
    drawn: list[Tensor] = []
    draw = torch.Tensor.uniform_

    def table(x: Tensor, low: float, high: float) -> Tensor:
        full = torch.rand(2, 16, 64, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        s = x.shape[1]
        start = 0 if s == 16 else s * dist.get_rank()
        return x.copy_(low + (high - low) * full[:, start : start + s])

    def note(x: Tensor, low: float, high: float) -> Tensor:
        drawn.append(draw(x, low, high))
        return drawn[-1]

    def step(one: nn.Module, how: Any) -> Tensor:
        torch.manual_seed(5 + dist.get_rank())
        one.zero_grad(set_to_none=True)
        with mock.patch.object(torch.Tensor, "uniform_", how):
            loss = one(**fresh(batch)).loss
            loss.backward()
        return loss

    mine, theirs = step(parallel, table), step(model, table)
    compare_loss(report, mine, theirs)
    compare_gradients(report, gradients(parallel, report), gradients(model))
    step(parallel, note)
    sums = gather_objects([float(x.sum()) for x in drawn])
    if len({values[0] for values in sums}) != (1 if ep == 1 else dist.get_world_size()):
        report.problems.append(f"noise drawn by the ranks: {sums}")
    for values in sums:
        # Two layers; drawn again in another order: the last layer first.
        if checkpoint and (values[2:]) != [values[1], values[0]]:
            report.problems.append(f"the recomputation draws other noise: {values}")
    return report


def rounding(family: str, ep: int) -> dict[str, float]:
    """`harness.noise` with a choice of experts that no rounding changes."""
    build = tiny.build

    def choose(module: nn.Module, args: tuple, output: tuple) -> tuple:
        logits, _, index = output
        wide = torch.promote_types(logits.dtype, torch.float32)
        chosen = torch.tensor([0, 3]).expand_as(index)
        values = logits.softmax(-1, dtype=wide).gather(1, chosen)
        return logits, values / values.sum(-1, keepdim=True), chosen.contiguous()

    def fixed(*args: Any, **kwargs: Any) -> nn.Module:
        model = build(*args, **kwargs)
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(choose)
        return model

    with mock.patch.object(tiny, "build", fixed):
        return noise(_case(family, ep, dtype="bfloat16"))


def saves(family: str, ep: int, folder: str) -> Report:
    """Written by all ranks, read by plain transformers bit for bit, and read back."""
    report = _report(f"{family} ep={ep} saving")
    model, parallel = pair(_case(family, ep))
    target = Path(folder) / f"{family}-{ep}"
    parallel.save_pretrained(target)
    dist.barrier()
    plain = compare_files(report, model, target)
    zero(parallel)
    parallel.load_state_dict(plain.state_dict())
    for name, p in parallel.named_parameters():
        report.compare(name, whole(p), model.get_parameter(name))
    return report


def compare_files(report: Report, model: nn.Module, folder: Path | str) -> nn.Module:
    """What was saved, read by plain transformers: every bit the model's."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for (name, one), (other, two) in zip(
        plain.named_parameters(), model.named_parameters(), strict=True
    ):
        if name != other or not torch.equal(one, two):
            report.problems.append(f"{name} differs in the file")
    return plain


def zero(parallel: nn.Module) -> None:
    """Forget every weight."""
    with torch.no_grad():
        for p in parallel.parameters():
            p.to_local().zero_()


def optimizer_states(cases: tuple[Case, ...], folder: str) -> Report:
    """AdamW state of each case's split, written once and read by every other."""
    report = Report("optimizer state", dist.get_rank())
    made = []
    for number, case in enumerate(cases):
        _, parallel = pair(case)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2, eps=1e-5)
        parallel(**batches.plain(2, 17)).loss.backward()
        optimizer.step()
        state = {
            (name, kind): whole(value).clone()
            for name, p in parallel.named_parameters()
            for kind, value in optimizer.state[p].items()
            if value.dim()
        }
        save_optimizer(parallel, optimizer, Path(folder) / str(number))
        dist.barrier()
        made.append((parallel, optimizer, state))
    for number, (*_, state) in enumerate(made):
        for parallel, optimizer, _ in made:
            load_optimizer(parallel, optimizer, Path(folder) / str(number))
            for name, p in parallel.named_parameters():
                for kind in ("exp_avg", "exp_avg_sq"):
                    value = optimizer.state[p][kind]
                    if value.placements != p.placements:
                        report.problems.append(f"{name}.{kind} is {value.placements}")
                    report.compare(f"{number} {name} {kind}", whole(value), state[name, kind])
    return report


class Sends(TorchDispatchMode):
    """Bytes that this rank puts into all-to-alls, by phase and shape of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[int, ...], torch.dtype, int, int]] = []
        self.kinds: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("_c10d_functional.all_to_all"):
            x, _, send = args[:3]
            away = sum(n for r, n in enumerate(send) if r != dist.get_rank())
            self.calls.append((x.shape, x.dtype, x.shape[0], away))
        if name.startswith("_c10d_functional") and "wait" not in name:
            self.kinds.append(name.split(".")[1])
        return func(*args, **(kwargs or {}))


def traffic(frozen: bool) -> dict[str, Any]:
    """What a step of one sparse layer sends, and how often each kind of collective runs."""
    parallel = parallelize(
        tiny.build("mixtral", torch.bfloat16, num_hidden_layers=1), ep=dist.get_world_size()
    )
    if frozen:
        for name, p in parallel.named_parameters():
            p.requires_grad_("experts" not in name)
    batch = {**batches.plain(2, 37), "output_router_logits": False}
    while parallel_state(parallel).checks_left["training"]:
        parallel(**batch)
    with Sends() as forward:
        loss = parallel(**batch).loss
    load = parallel_state(parallel).load["model.layers.0.mlp.experts"].sum().item()
    with Sends() as backward:
        loss.backward()
    return {"forward": forward.calls, "backward": backward.calls, "rows": load}


def alive(ep: int, length: int) -> dict[str, int]:
    """Bytes alive after the forward of a bf16 model with two and one sparse layers: this rank's."""
    from hf_sp.estimate import count_step

    found = {}
    for layers in (1, 2):
        torch.manual_seed(0)
        model = tiny.build(
            "qwen3_moe", torch.bfloat16, num_hidden_layers=layers, mlp_only_layers=[]
        )
        parallel = parallelize(model, ep=ep)
        batch = {**batches.plain(1, length), "output_router_logits": False, "use_cache": False}
        while parallel_state(parallel).checks_left["training"]:
            parallel(**batch)
        step = count_step(lambda parallel=parallel, batch=batch: parallel(**batch).loss)
        found[layers] = step
        rows = parallel_state(parallel).load
    last = rows["model.layers.1.mlp.experts"].clone()
    return {"bytes": found[2].alive_bytes - found[1].alive_bytes, "load": last.tolist()}


def copied() -> Report:
    """A deep copy trains by itself, and the original stays what it was."""
    report = _report("copy")
    model, parallel = pair(_case("qwen2_moe", dist.get_world_size()))
    twin = copy.deepcopy(parallel)
    compare_once(report, model, twin, batches.plain(2, 17), label="copy ")
    if any(p.grad is not None for p in parallel.parameters()):
        report.problems.append("the copy's gradients are the original's")
    compare_once(report, model, parallel, batches.plain(2, 17), label="original ")
    return report


def grouped_implementation(dtype: str) -> Report:
    """Whatever experts_implementation the user has chosen."""
    report = _report("implementations", dtype)
    for name in ("eager", "grouped_mm", "batched_mm"):
        model, parallel = pair(Case("mixtral", dtype=dtype))
        parallel.set_experts_implementation(name)
        compare_once(report, model, parallel, batches.plain(2, 17), label=f"{name} ")
    return report


def adapters(ep: int, targets: tuple[str, ...]) -> Report:
    """LoRA with factors that are not zero."""
    from peft import LoraConfig, get_peft_model

    report = _report(f"LoRA ep={ep}")
    plain = tiny.build("qwen2_moe")
    models = []
    for one in (plain, copy.deepcopy(plain)):
        adapted = get_peft_model(one, LoraConfig(r=4, target_modules=list(targets)))
        generator = torch.Generator().manual_seed(1)
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.data = 0.2 * noise
        models.append(adapted)
    model, parallel = models[0], parallelize(models[1], ep=ep)
    tiny.reference(model.get_base_model())
    compare_once(report, model, parallel, batches.plain(2, 17))
    return report


def foreign_hands(family: str, ep: int) -> list[Report]:
    """Somebody writes into a sparse block's input, or watches its gradient."""
    found = []
    for kind in ("written", "watched"):
        case = Case(family, parallelize=(("ep", ep),))
        model, parallel = pair(case)
        batch = batches.plain(2, 18, model.config.vocab_size)

        def hook(module: nn.Module, args: tuple, kind: str = kind) -> None:
            if kind == "written":
                args[0].mul_(2.0)
            else:
                args[0].register_hook(lambda grad: 3 * grad)

        for one in (model, parallel):
            one.model.layers[0].mlp.register_forward_pre_hook(hook)
            one(**batch).loss.backward()
        report = Report(f"{case} {kind}", dist.get_rank(), case.dtype)
        compare_gradients(report, gradients(parallel, report), gradients(model))
        found.append(report)
    return found
