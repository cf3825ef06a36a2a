"""Rank functions: LoRA on a parallelized model against LoRA on the unsharded one.

B is not zero from the start (at zero, A has no gradient and a lost sum does not show), two steps
with clipping active, every factor's gradient. Both orders: PEFT first, ``parallelize`` first.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import transformers.integrations.peft
from harness import batches, tiny
from harness.compare import (
    attempt,
    check_contract,
    check_replicas,
    compare_gradients,
    gather_objects,
    gradients,
    whole,
)
from harness.parity import Case, _compare_runs, _run, around
from harness.report import Report
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_sp import parallelize
from hf_sp.errors import HfSpError
from hf_sp.model.dropout import Dropout

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Lora:
    """A LoRA case: the parity case, the order and the LoraConfig's fields."""

    case: Case
    order: str = "before"
    config: tuple[tuple[str, Any], ...] = ()

    def varied(self, **fields: Any) -> Lora:
        """The same but for some fields of the parity case."""
        return replace(self, case=replace(self.case, **fields))

    def __str__(self) -> str:
        fields = ",".join(f"{k}={v}" for k, v in self.config)
        return f"{self.case}-{self.order}-{fields}"


def config(**fields: Any) -> peft.LoraConfig:
    options = {"r": 3, "lora_alpha": 5, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}
    if "rank_pattern" in fields:
        fields["rank_pattern"] = dict(fields["rank_pattern"])
    return peft.LoraConfig(**{**options, **fields})


def base(case: Case) -> nn.Module:
    return tiny.build(
        case.family, getattr(torch, case.dtype), case.seed, case.attn, **dict(case.model_kwargs)
    )


def judge(model: nn.Module) -> nn.Module:
    """The unsharded model with adapters, as the judge."""
    tiny.reference(model.get_base_model())
    return model


@torch.no_grad()
def fill(model: nn.Module, seed: int = 1) -> None:
    """Non-trivial values for all adapter weights of an unsharded model."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "magnitude" in name:
                p.mul_(1 + 0.1 * noise)
            elif "modules_to_save" in name:
                p.add_(0.1 * noise)
            else:
                p.copy_(noise / p.shape[1] ** 0.5)


def unsharded(lora: Lora) -> nn.Module:
    """The unsharded model with adapters."""
    model = peft.get_peft_model(base(lora.case), config(**dict(lora.config)))
    fill(model)
    return model


def pair(lora: Lora) -> tuple[nn.Module, nn.Module]:
    """(unsharded, parallel), same weights, adapters on both."""
    case, fields = lora.case, dict(lora.config)
    model = unsharded(lora)
    data = {} if case.data == 1 else {"dp_shard": case.data}
    options = {"tp": case.tp, "cp": case.cp, "sp": case.sp, **data, **dict(case.parallelize)}
    if lora.order == "before":
        parallel = parallelize(copy.deepcopy(model), **options)
    else:
        other = parallelize(base(case), **options)
        parallel = peft.get_peft_model(other, config(**fields))
        parallel.load_state_dict(model.state_dict())
    # A head with an adapter makes logits, which go to the model's own loss: the judge's is float64.
    parallel.get_base_model().loss_function.original = tiny.float64_loss
    return judge(model).train(), parallel.train()


class SameMasks(nn.Module):
    """Dropout for the unsharded model with the masks that the ranks make, from the same draws."""

    def __init__(
        self, p: float, row: bool, padded: bool, tp: int, sp: bool, block: dict[str, Any]
    ) -> None:
        super().__init__()
        self.p, self.row, self.padded, self.tp, self.sp = p, row, padded, tp, sp
        self.block = block

    def draw(self) -> Dropout:
        """A draw of its own for a row linear; one for all column linears of a block."""
        if self.row:
            return Dropout.draw(self.p)
        if not self.block or id(self) in self.block["seen"]:
            self.block.update(draw=Dropout.draw(self.p), seen=set())
        self.block["seen"].add(id(self))
        return self.block["draw"]

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.draw()
        length = x.shape[1]
        if not self.row:
            if not self.sp:
                return drawn.part(x, 0) * drawn.scale
            return drawn.parts(x.transpose(0, 1), self.tp).transpose(0, 1) * drawn.scale
        if self.padded and self.sp:
            # The MLP sees the padding rows of the shards.
            missing = -length % self.tp
            x = torch.cat([x, x.new_zeros(x.shape[0], missing, x.shape[2])], 1)
        pieces = [drawn.part(piece, i) for i, piece in enumerate(x.chunk(self.tp, -1))]
        return torch.cat(pieces, -1)[:, :length] * drawn.scale


def use_same_masks(model: nn.Module, sp: bool) -> None:
    blocks: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLinear):
            row, padded = name.endswith(("o_proj", "down_proj")), "mlp" in name
            p = layer.lora_dropout["default"].p
            block = blocks.setdefault(name.rpartition(".")[0], {})
            masks = SameMasks(p, row, padded, dist.get_world_size(), sp, block)
            layer.lora_dropout["default"] = masks
    # Ranks agree on a stream for each forward (hf_sp.model.streams): the first one's next number.
    before: list[Tensor] = []

    def agree(module: nn.Module, args: Any) -> None:
        seed = int(torch.randint(2**62, (1, 1)))
        before.append(torch.get_rng_state())
        torch.manual_seed(seed)

    def give_back(module: nn.Module, args: Any, output: Any) -> None:
        torch.set_rng_state(before.pop())

    model.register_forward_pre_hook(agree)
    model.register_forward_hook(give_back)


@functools.lru_cache(maxsize=16)
def _reference_run(lora: Lora) -> Any:
    """The unsharded model's run; its dropout has the ranks' masks."""
    model = judge(unsharded(lora)).train()
    if dict(lora.config).get("lora_dropout"):
        use_same_masks(model, lora.case.sp)
    torch.manual_seed(11)
    return _run(model, lora.case, None)


def train(lora: Lora) -> Report:
    """Two optimizer steps, parallel against unsharded."""
    case = lora.case
    report = Report(str(lora), dist.get_rank(), case.judged or case.dtype)
    model, parallel = pair(lora)
    check_contract(report, parallel, model)
    want = _reference_run(lora.varied(checkpoint="none", around=None, parallelize=()))
    torch.manual_seed(11)
    with around(case):
        if case.checkpoint == "reentrant":
            parallel.enable_input_require_grads()
        got = _run(parallel, case, report)
    _compare_runs(report, got, want, case.group)
    check_replicas(report, parallel)
    adapters = [n for n in want.steps[0].gradients if "lora_" in n]
    if not adapters or any(not want.steps[0].gradients[n].any() for n in adapters):
        report.problems.append("a factor has no gradient: nothing is shown")
    return report


def train_all(cases: Iterable[Lora]) -> list[Report]:
    return [attempt(str(one), lambda one=one: train(one)) for one in cases]


# --- init ---------------------------------------------------------------------------------------


def initial(seeds: str, fields: dict[str, Any]) -> dict[str, bool]:
    """Factors of a new adapter, parallel against one process, for seeds alike or not."""
    plain = base(Case("llama"))
    other = parallelize(copy.deepcopy(plain))
    torch.manual_seed(3)
    want = peft.get_peft_model(plain, config(**fields)).state_dict()
    torch.manual_seed(3 + (dist.get_rank() if seeds == "own" else 0))
    got = peft.get_peft_model(other, config(**fields))
    equal = {
        name: torch.equal(whole(p), want[name])
        for name, p in got.named_parameters()
        if "lora_" in name
    }
    shards = [p.to_local() for n, p in got.named_parameters() if "o_proj.lora_A" in n]
    report = Report("initial", dist.get_rank())
    check_replicas(report, got)
    return {
        "equal": all(equal.values()) and len(equal) == 28 + 14 * fields.get("use_dora", False),
        "replicas": not report.problems,
        "shards_differ": len({x.sum().item() for x in gather_objects(shards[0])}) > 1,
    }


# --- use ----------------------------------------------------------------------------------------


def lifecycle(order: str, directory: str) -> Report:
    """Several adapters: switched, combined, disabled, merged, deleted, saved, loaded."""
    report = Report(f"lifecycle {order}", dist.get_rank())
    case = Case("llama_bias")
    plain = base(case)
    other = copy.deepcopy(plain)
    ids = torch.arange(34).view(2, 17)

    def both(action: Callable[[Any], Any]) -> None:
        for one in (model, parallel):
            action(one)

    def compare(what: str) -> None:
        model.eval(), parallel.eval()
        with torch.no_grad():
            report.compare(what, parallel(input_ids=ids).logits, model(input_ids=ids).logits)

    model = peft.get_peft_model(plain, config())
    model.add_adapter("two", config(r=2, target_modules=["q_proj", "o_proj"], use_rslora=True))
    fill(model)
    if order == "before":
        parallel = parallelize(copy.deepcopy(model))
    else:
        parallel = peft.get_peft_model(parallelize(other), config())
        second = config(r=2, target_modules=["q_proj", "o_proj"], use_rslora=True)
        parallel.add_adapter("two", second)
        parallel.load_state_dict(model.state_dict())
    compare("default")
    mask = torch.ones_like(ids)
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    made = [one.generate(input_ids=ids, **options) for one in (model, parallel)]
    if not torch.equal(*made):
        report.problems.append("other tokens are generated")
    both(lambda m: m.set_adapter("two"))
    compare("second")
    trains = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, parallel)]
    if trains[0] != trains[1] or not trains[0]:
        report.problems.append(f"trainable differ: {set(trains[0]) ^ set(trains[1])}")
    both(lambda m: m.base_model.set_adapter(["default", "two"]))
    compare("both")
    with model.disable_adapter(), parallel.disable_adapter():
        compare("disabled")
    copied = copy.deepcopy(parallel)
    both(lambda m: m.merge_adapter())
    compare("merged")
    both(lambda m: m.unmerge_adapter())
    compare("unmerged")
    parallel.save_pretrained(directory)
    if dist.get_rank() == 0:
        model.save_pretrained(f"{directory}-plain")
    dist.barrier()
    for folder in ("", "/two"):
        mine = load_file(f"{directory}{folder}/adapter_model.safetensors")
        theirs = load_file(f"{directory}-plain{folder}/adapter_model.safetensors")
        if list(mine) != list(theirs):
            report.problems.append(f"names in files: {set(mine) ^ set(theirs)}")
        for name, tensor in theirs.items():
            if not torch.equal(mine[name], tensor):
                report.problems.append(f"{name} is saved with other values")
        configs = [
            json.loads(Path(f"{d}{folder}/adapter_config.json").read_text())
            for d in (directory, f"{directory}-plain")
        ]
        for one in configs:
            one["target_modules"].sort()
        if configs[0] != configs[1]:
            report.problems.append("configs differ")
    both(lambda m: m.delete_adapter("two"))
    both(lambda m: m.set_adapter("default"))
    compare("deleted")
    # The other way's files, into a model of the other kind.
    for one in (model, parallel):
        one.load_adapter(f"{directory}/two", "again")
        one.set_adapter("again")
    compare("loaded again")
    both(lambda m: m.set_adapter("default"))
    merged, whole_model = parallel.merge_and_unload(), model.merge_and_unload()
    report.compare(
        "merge_and_unload",
        merged(input_ids=ids).logits.detach(),
        whole_model(input_ids=ids).logits.detach(),
    )
    if [n for n, _ in merged.named_parameters()] != [n for n, _ in plain.named_parameters()]:
        report.problems.append("names after merge_and_unload")
    fresh = PeftModel.from_pretrained(parallelize(base(case)), directory)
    reference = PeftModel.from_pretrained(base(case), f"{directory}-plain")
    model, parallel = reference, fresh
    compare("from_pretrained")
    parallel.train()
    copied.train()(input_ids=ids, labels=ids).loss.backward()
    alone = all(p.grad is None for p in parallel.parameters())
    if not alone or all(p.grad is None for p in copied.parameters()):
        report.problems.append("a copy is not a model of its own")
    return report


def native(directory: str) -> Report:
    """transformers' own ``add_adapter``, ``load_adapter`` and ``save_pretrained``.

    transformers 5.24 wants a PEFT 0.22 that is not released: here the installed one is enough.
    """
    report = Report("native", dist.get_rank())
    transformers.integrations.peft.MIN_PEFT_VERSION = peft.__version__
    plain = base(Case("llama"))
    other, third = parallelize(copy.deepcopy(plain)), parallelize(copy.deepcopy(plain))
    for one in (plain, other):
        torch.manual_seed(3)
        one.add_adapter(config(init_lora_weights=False))
    ids = torch.arange(34).view(2, 17)
    for one in (tiny.reference(plain), other):
        one.train()(input_ids=ids, labels=ids).loss.backward()
    compare_gradients(report, gradients(other, report), gradients(plain))
    other.save_pretrained(directory)
    dist.barrier()
    third.load_adapter(directory)
    with torch.no_grad():
        want = plain.eval()(input_ids=ids).logits
        report.compare("logits", third.eval()(input_ids=ids).logits, want)
    return report


def noise(base_dtype: str, autocast: bool, upcast: bool) -> dict[str, float]:
    """Relative error of the factors' gradients against float64, unsharded and parallel."""
    exact = judge(peft.get_peft_model(base(Case("llama")), config()))
    fill(exact)
    dtype = getattr(torch, base_dtype)
    low = peft.get_peft_model(tiny.build("llama", dtype), config(), autocast_adapter_dtype=upcast)
    low.load_state_dict(exact.state_dict())
    parallel = parallelize(copy.deepcopy(low))
    found: list[dict[str, Tensor]] = []
    total = {"unsharded": 0.0, "parallel": 0.0}
    for seed in range(3):
        found = []
        for one in (exact, low, parallel):
            one.zero_grad()
            batch = batches.left_padded(2, 17, 96, seed)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and one is not exact):
                loss = one(**batch).loss
            loss.backward()
            found.append(gradients(one))
        for name, want in found[0].items():
            for key, got in zip(total, found[1:], strict=True):
                error = (got[name].double() - want).norm() / want.norm()
                total[key] += float(error) ** 2 / len(found[0]) / 3
    return {key: value**0.5 for key, value in total.items()}


# --- refusals -----------------------------------------------------------------------------------


def _message(function: Callable[[], Any]) -> str | None:
    try:
        function()
    except HfSpError as error:
        return f"{type(error).__name__}: {error}"
    return None


def refuse_after(fields: dict[str, Any], kind: str = "LoraConfig") -> tuple[str | None, bool]:
    """An adapter over a parallelized model: (message, model untouched)."""
    model = parallelize(base(Case(fields.pop("family", "llama"))))
    before = dict(model.named_modules())
    low = fields.pop("low_cpu_mem_usage", False)
    if kind == "LoraConfig":
        chosen = config(**fields)
    else:
        chosen = getattr(peft, kind)(task_type="CAUSAL_LM", **fields)
    message = _message(lambda: peft.get_peft_model(model, chosen, low_cpu_mem_usage=low))
    after = dict(model.named_modules())
    return message, list(after) == list(before) and all(after[n] is m for n, m in before.items())


def refuse_before(fields: dict[str, Any], kind: str = "LoraConfig") -> tuple[str | None, bool]:
    """``parallelize`` of a model with such an adapter."""
    chosen = (
        config(**fields)
        if kind == "LoraConfig"
        else getattr(peft, kind)(task_type="CAUSAL_LM", **fields)
    )
    model = peft.get_peft_model(base(Case("llama")), chosen)
    if fields.get("merged"):
        model.merge_adapter()
    before = {**dict(model.named_parameters()), **dict(model.named_modules())}
    message = _message(lambda: parallelize(model))
    after = {**dict(model.named_parameters()), **dict(model.named_modules())}
    return message, list(after) == list(before) and all(after[n] is m for n, m in before.items())


def refuse_methods(directory: str) -> list[str | None]:
    """What PEFT's methods would do on the writing rank alone, or to shards."""
    model = peft.get_peft_model(parallelize(base(Case("llama"))), config())
    model.add_adapter("two", config())
    mixed = {"adapter_names": ["default", "two"]}
    ids = torch.arange(12).view(2, 6)
    model.eval()
    return [
        _message(lambda: model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "both")),
        _message(
            lambda: model.save_pretrained(
                directory, path_initial_model_for_weight_conversion=directory
            )
        ),
        _message(lambda: model(input_ids=ids, **mixed)),
        _message(lambda: hotswap_adapter(model, _saved(model, directory), "default")),
    ]


def _saved(model: nn.Module, directory: str) -> str:
    model.save_pretrained(directory, selected_adapters=["default"])
    return directory


def misfit(directory: str) -> tuple[str | None, bool]:
    """An adapter file whose tensors have the shape of a rank's shard."""
    model = peft.get_peft_model(parallelize(base(Case("llama"))), config())
    model.save_pretrained(directory)
    path = f"{directory}/adapter_model.safetensors"
    if dist.get_rank() == 0:
        tensors = load_file(path)
        name = next(n for n in tensors if "q_proj.lora_B" in n)
        tensors[name] = tensors[name][: len(tensors[name]) // 2].contiguous()
        save_file(tensors, path)
    dist.barrier()
    before = {n: whole(p).clone() for n, p in model.named_parameters()}
    message = _message(lambda: model.load_adapter(directory, "default"))
    return message, all(torch.equal(whole(p), before[n]) for n, p in model.named_parameters())
