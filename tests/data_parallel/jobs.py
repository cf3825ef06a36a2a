"""Rank functions: uses of models with data parallel ranks beside tp, beyond their parity matrix."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from behaviour.generation import compare_generation
from harness import batches, tiny
from harness.compare import (
    compare_gradients,
    compare_once,
    compare_plain,
    evaluating,
    fresh,
    gather_objects,
    gradients,
    whole,
)
from harness.parity import Case, pair
from harness.report import Report
from sparse.jobs import DECODING, Sends, compare_files, zero
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sp import parallel_state, parallelize
from hf_sp.errors import HfSpError
from hf_sp.estimate import count_step


def _report(case: Case) -> Report:
    return Report(str(case), dist.get_rank(), case.dtype)


def inputs(case: Case) -> Report:
    """Each group another length, padding on either side, packing; the truth is their mean."""
    report = _report(case)
    model, parallel = pair(case)
    kinds = {
        "lengths": [batches.plain(2, 17), batches.plain(3, 8)],
        "short": [batches.plain(1, 2), batches.plain(2, 21)],
        "padded": [batches.left_padded(3, 15), batches.right_padded(2, 19)],
        "packed": [batches.packed((5, 1, 7, 4)), batches.ignored_runs(3, 7)],
        "embeds": [batches.with_inputs_embeds(batches.plain(2, n)) for n in (16, 9)],
    }
    for name, several in kinds.items():
        model.zero_grad()
        parallel.zero_grad()
        want = [model(**fresh(batch)).loss for batch in several]
        (sum(want) / len(want)).backward()
        loss = parallel(**fresh(several[case.group])).loss
        loss.backward()
        report.compare(f"{name} loss", loss, want[case.group])
        compare_gradients(report, gradients(parallel, report), gradients(model), f"{name} ")
    return report


def outputs(case: Case) -> Report:
    """Logits in eval, and hidden states, attention weights and logits of a training forward."""
    report = _report(case)
    model, parallel = pair(case)
    batch = batches.plain(2, 17, seed=case.group)
    with evaluating(model, parallel):
        for _ in range(2):
            want, got = (one(input_ids=batch["input_ids"]) for one in (model, parallel))
            compare_plain(report, "logits", whole(got.logits), want.logits)
    want, got = (one(**fresh(batch), output_hidden_states=True) for one in (model, parallel))
    for mine, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        compare_plain(report, "hidden states", mine, theirs)
    # Between an evaluation and a training step weights are where they were.
    compare_once_of_equal_batches(report, model, parallel)
    return report


def compare_once_of_equal_batches(report: Report, model: Any, parallel: Any) -> None:
    """All groups the same batch: their mean is the one's."""
    compare_once(report, model, parallel, batches.plain(2, 17))


def generates(case: Case) -> Report:
    """Greedy decoding; every group prompts of its own."""
    report = _report(case)
    model, parallel = pair(case)
    model.eval(), parallel.eval()
    for batch, length in ((1, 1), (3, 9)):
        ids = batches.plain(batch, length, seed=case.group)["input_ids"]
        compare_generation(report, model, parallel, ids, **DECODING)
    return report


def saves(case: Case, folder: str) -> Report:
    """Written by all ranks, read by plain transformers bit for bit, and read back; DCP too."""
    report = _report(case)
    model, parallel = pair(case)
    parallel.save_pretrained(folder)
    dist.barrier()
    written = json.loads((Path(folder) / "config.json").read_text())
    if written["architectures"] != [type(model).__name__]:
        report.problems.append(f"architectures {written['architectures']}")
    plain = compare_files(report, model, folder)

    def compare(label: str) -> None:
        for name, p in parallel.named_parameters():
            report.compare(f"{label} {name}", whole(p), model.get_parameter(name))

    zero(parallel)
    parallel.load_state_dict(plain.state_dict())
    compare("loaded")
    rectangular = {
        name: p for name, p in parallel.state_dict().items() if "experts.gate_up" not in name
    }
    dcp.save(rectangular, checkpoint_id=f"{folder}/dcp")
    kept = {name: p for name, p in parallel.state_dict().items() if name not in rectangular}
    whole_experts = {name: p.detach().clone() for name, p in kept.items()}
    zero(parallel)
    dcp.load(rectangular, checkpoint_id=f"{folder}/dcp")
    for name, p in whole_experts.items():
        kept[name].copy_(p)
    compare("dcp")
    return report


def load(case: Case) -> dict[str, Any]:
    """Tokens per expert by hf_sp, and by the unsharded model for every group's batch."""
    model, parallel = pair(case)
    groups = [batches.plain(2, 17, seed=group) for group in range(case.data)]
    with evaluating(model, parallel):
        parallel(**groups[case.group])
        routed = [model(**batch, output_router_logits=True).router_logits for batch in groups]
    wanted = [
        [x.topk(2, -1).indices.flatten().bincount(minlength=x.shape[1]).tolist() for x in layers]
        for layers in routed
    ]
    found = [counts.tolist() for counts in parallel_state(parallel).expert_load().values()]
    return {"found": found, "wanted": wanted, "group": case.group}


def traffic(case: Case) -> dict[str, Any]:
    """What a step of one sparse layer sends, and how often each kind of collective runs."""
    _, parallel = pair(case)
    batch = {**batches.plain(2, 37, seed=case.group), "output_router_logits": False}
    while parallel_state(parallel).checks_left["training"]:
        parallel(**batch)
    with Sends() as forward:
        loss = parallel(**batch).loss
    counts = parallel_state(parallel).load["model.layers.0.mlp.experts"].sum().item()
    with Sends() as backward:
        loss.backward()
    return {"forward": forward.calls, "backward": backward.calls, "rows": counts}


class _Weights(TorchDispatchMode):
    """What FSDP sends: (operation, bytes that this rank puts in)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = str(func).split(".")[1]
        if str(func).startswith("c10d.") and kind in ("_allgather_base_", "_reduce_scatter_base_"):
            self.calls.append((kind, args[1].numel() * args[1].element_size()))
        return func(*args, **(kwargs or {}))


def weights_sent(case: Case) -> dict[str, Any]:
    """What FSDP sends for one sparse layer in a step, and the layer's parameters on this rank."""
    found = []
    for layers in (1, 2):
        fields = (*case.model_kwargs, ("num_hidden_layers", layers))
        _, parallel = pair(replace(case, model_kwargs=fields))
        batch = {**batches.plain(2, 16, seed=case.group), "output_router_logits": False}
        with _Weights() as forward:
            loss = parallel(**batch).loss
        with _Weights() as backward:
            loss.backward()
        found.append((forward.calls, backward.calls))
    sizes = {n: _bytes(p.to_local()) for n, p in parallel.model.layers[1].named_parameters()}
    return {"one": found[0], "two": found[1], "sizes": sizes}


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def accumulates(case: Case) -> Report:
    """FSDP's own switch: the first micro-batch's gradients stay on the groups."""
    report = _report(case)
    model, parallel = pair(case)
    model.zero_grad()
    for micro in range(2):
        for group in range(case.data):
            (model(**batches.plain(2, 17, seed=2 * micro + group)).loss / case.data).backward()
        parallel.set_requires_gradient_sync(micro == 1)
        parallel(**batches.plain(2, 17, seed=2 * micro + case.group)).loss.backward()
    compare_gradients(report, gradients(parallel, report), gradients(model))
    return report


def alive(case: Case) -> tuple[int, int]:
    """Bytes that a layer keeps from forward to backward, and that a step leaves alive at rest."""
    kept = {}
    for layers in (1, 2):
        torch.manual_seed(0)
        model = tiny.build(case.family, torch.bfloat16, num_hidden_layers=layers)
        degrees = {"dp_shard": case.data} if case.data > 1 else {}
        parallel = parallelize(model, tp=2, **degrees)
        batch = {**batches.plain(1, 64), "use_cache": False}
        while parallel_state(parallel).checks_left["training"]:
            parallel(**batch).loss.backward()
        kept[layers] = count_step(
            lambda parallel=parallel, batch=batch: parallel(**batch).loss
        ).alive_bytes
    stored = sum(p.to_local().numel() for p in parallel.model.layers[1].parameters())
    return kept[2] - kept[1], stored


def between_steps(case: Case) -> Report:
    """Whoever looks or computes between two steps leaves the parameters what they were."""
    report = _report(case)
    model, parallel = pair(case)
    ids = batches.plain(2, 9, seed=case.group)["input_ids"]
    known = {name: id(p) for name, p in parallel.named_parameters()}
    # As in DECODING; a model without experts does not know it.
    without_aux = {"output_router_logits": False} if case.family != "llama" else {}

    def same(when: str) -> None:
        now = {name: id(p) for name, p in parallel.named_parameters()}
        other = [name for name in known if now.get(name) != known[name]]
        if other:
            report.problems.append(f"after {when} other parameters: {other}")

    # The very first forward, of which FSDP keeps buffers.
    with torch.inference_mode():
        parallel(input_ids=ids)
    same("inference")
    optimizers = [torch.optim.SGD(one.parameters(), lr=1.0) for one in (model, parallel)]
    for step in range(2):
        for group in range(case.data):
            (model(**batches.plain(2, 17, seed=2 * step + group)).loss / case.data).backward()
        parallel(**batches.plain(2, 17, seed=2 * step + case.group)).loss.backward()
        compare_gradients(report, gradients(parallel, report), gradients(model), f"step {step} ")
        with evaluating(parallel):
            parallel(input_ids=ids)
        same("an evaluation")
        norms = [torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1) for one in (model, parallel)]
        report.compare("norm", whole(norms[1]), norms[0])
        parallel.generate(input_ids=ids, max_new_tokens=2, pad_token_id=0, **without_aux)
        same("generate")
        for optimizer in optimizers:
            optimizer.step()
        # A forward that nobody goes back through.
        parallel(input_ids=ids)
        same("a forward alone")
        model.zero_grad()
        parallel.zero_grad()
        for name, p in parallel.named_parameters():
            report.compare(f"step {step} {name}", whole(p), model.get_parameter(name))
    return report


def single_token_load(case: Case) -> list[int]:
    """Tokens counted in a forward of one token."""
    _, parallel = pair(case)
    with evaluating(parallel):
        parallel(input_ids=torch.tensor([[5 + case.group]]))
    return [int(counts.sum()) for counts in parallel_state(parallel).expert_load().values()]


def dropped() -> list[float]:
    """Loss of a model with attention dropout; all groups the same batch and the same seed."""
    case = Case("llama", data=2, model_kwargs=(("attention_dropout", 0.5),))
    _, parallel = pair(case)
    torch.manual_seed(0)
    return gather_objects(float(parallel(**batches.plain(2, 17)).loss))


def ranks_differ(kind: str) -> tuple[str | None, bool]:
    """One rank, or one group, asks for something else, with a mesh of the user's."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    model = tiny.build("llama", num_hidden_layers=3 if kind == "layers" and _second() else 2)
    kwargs: dict[str, Any] = {"keep_logits": kind == "options" and _second()}
    if kind == "gradient" and dist.get_rank() == 3:
        model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    before = dict(model.named_parameters())
    message = _message(lambda: parallelize(model, mesh=mesh, **kwargs))
    return message, all(p is before[n] for n, p in model.named_parameters())


def _second() -> bool:
    return dist.get_rank() >= 2


def batch_differs(kind: str) -> tuple[str | None, Report]:
    """One rank of one group is given another batch, or one group another kind; then all go on."""
    case = Case("llama", data=2)
    report = _report(case)
    model, parallel = pair(case)
    batch = batches.plain(2, 17, seed=case.group)
    if kind == "batch" and dist.get_rank() == 3:
        batch["input_ids"] = batch["input_ids"].flip(0)
    if kind == "kinds" and _second():
        batch = batches.with_inputs_embeds(batch)
    message = _message(lambda: parallel(**batch))
    compare_once_of_equal_batches(report, model, parallel)
    return message, report


def other_weights() -> Report:
    """The groups built other models: all take the first rank's."""
    report = Report("other weights", dist.get_rank())
    case = Case("llama", data=2)
    model = tiny.build("llama", seed=case.group)
    parallel = parallelize(model, tp=case.tp, dp_shard=2)
    first = tiny.reference(tiny.build("llama", seed=0))
    compare_once_of_equal_batches(report, first, parallel)
    return report


def _message(function: Any) -> str | None:
    try:
        function()
    except HfSpError as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals() -> dict[str, Any]:
    """What is not built beside data parallel ranks, and whether the model was touched."""
    parallel = parallelize(tiny.build("llama", torch.float32), tp=2, dp_shard=2)
    names = [n for n, _ in parallel.named_parameters()]
    found = {}
    for case, fields in {
        "head adapter": {"target_modules": ["lm_head"]},
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    }.items():
        config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **fields)
        found[case] = _message(lambda c=config: peft.get_peft_model(parallel, c))
    touched = names != [n for n, _ in parallel.named_parameters()]
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(parallel, config)
    names = [n for n, _ in adapted.named_parameters()]
    found["second adapter"] = _message(lambda: adapted.add_adapter("two", config))
    touched |= names != [n for n, _ in adapted.named_parameters()]
    found["merge"] = _message(adapted.merge_adapter)
    parallel = parallelize(tiny.build("llama", torch.float32), tp=2, dp_shard=2)
    ids = torch.arange(8)[None]
    found["a module alone"] = _message(lambda: parallel.model.embed_tokens(ids))
    hidden = torch.zeros(1, 8, 64)
    angles = parallel.model.rotary_emb(hidden, ids)
    layer = parallel.model.layers[0]
    found["a layer alone"] = _message(lambda: layer(hidden, position_embeddings=angles))
    mixed = tiny.build("llama", torch.bfloat16)
    mixed.model.norm.float()
    before = dict(mixed.named_parameters())
    found["dtypes"] = _message(lambda: parallelize(mixed, tp=2, dp_shard=2))
    touched |= any(p is not before[n] for n, p in mixed.named_parameters())
    odd = peft.LoraConfig(r=3, target_modules=["gate_up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny.build("phi3"), odd)
    found["packed, adapters first"] = _message(lambda: parallelize(adapted, tp=2, dp_shard=2))
    packed = parallelize(tiny.build("phi3"), tp=2, dp_shard=2)
    names = [n for n, _ in packed.named_parameters()]
    found["packed, adapters second"] = _message(lambda: peft.get_peft_model(packed, odd))
    touched |= names != [n for n, _ in packed.named_parameters()]
    odd.r = 4
    found["an even rank"] = _message(lambda: peft.get_peft_model(packed, odd))
    return {**found, "touched": touched}


def refuse(
    family: str,
    shape: tuple[int, ...] = (),
    names: tuple[str, ...] = (),
    fields: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[str | None, bool]:
    """Arguments that `parallelize` refuses: (message, untouched)."""
    if shape:
        kwargs["mesh"] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = tiny.build(family, **(fields or {}))
    before = dict(model.named_parameters())
    message = _message(lambda: parallelize(model, **kwargs))
    return message, all(p is before[n] for n, p in model.named_parameters())


def user_mesh(shape: tuple[int, ...], names: tuple[str, ...], ep: int) -> Report:
    """A mesh of the user's, with data parallel axes."""
    report = Report(f"mesh {names}", dist.get_rank())
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = tiny.build("mixtral")
    parallel = parallelize(tiny.build("mixtral"), mesh=mesh, ep=ep)
    compare_once_of_equal_batches(report, tiny.reference(model), parallel)
    norms = [torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1) for one in (model, parallel)]
    report.compare("norm", whole(norms[1]), norms[0])
    return report


def replicas(case: Case) -> Report:
    """After steps on other batches the groups hold the same bits."""
    report = _report(case)
    _, parallel = pair(case)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    for step in range(2):
        loss = parallel(**batches.plain(2, 17, seed=2 * step + case.group)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mine = {name: _bits(p.to_local()) for name, p in parallel.named_parameters()}
    other = gather_objects(mine)[(dist.get_rank() + case.tp) % dist.get_world_size()]
    for name, bits in mine.items():
        report.compare(name, torch.tensor(other[name] == bits), torch.tensor(True))
    return report


def _bits(x: Tensor) -> bytes:
    return x.detach().contiguous().numpy().tobytes()
