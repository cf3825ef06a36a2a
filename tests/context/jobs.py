"""Rank functions of context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from behaviour.generation import compare_generation
from behaviour.inputs import inputs
from harness import batches, tiny
from harness.compare import compare_once, compare_plain, evaluating, fresh
from harness.parity import Case, each, pair
from harness.report import Report
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

from hf_sp import parallelize
from hf_sp.context import ring
from hf_sp.errors import HfSpError
from hf_sp.model.compile import compile_layers
from hf_sp.plan import Plan, derive_plan
from hf_sp.plan.exchange import Exchange


def uses(case: Case, only: tuple[str, ...] = ()) -> dict[str, Report]:
    """What a user does with a model beside a training step; some of it only."""
    model, parallel = pair(case)
    run = {
        "attentions of eager": lambda report: _recorded(report, model, parallel),
        "hidden states": lambda report: _hidden(report, model, parallel),
        "generation": lambda report: _generates(report, model, parallel),
        "an implementation chosen later": lambda report: _chosen_later(
            report, model, parallel, case
        ),
        "kv heads that cp does not divide": lambda report: _uneven(report, case),
        "soft caps": lambda report: _capped(report, case),
    }
    assert tuple(run) == USES
    # A ring has neither the weights of a row nor soft caps.
    run = {n: run[n] for n in only or (RING_USES if dict(case.parallelize) else USES)}
    return each(case, run, lambda report, name: run[name](report))


USES = (
    *("attentions of eager", "hidden states", "generation", "an implementation chosen later"),
    *("kv heads that cp does not divide", "soft caps"),
)
RING_USES = USES[1:-1]


def tiled_inputs(case: Case, only: tuple[str, ...]) -> dict[str, Report]:
    """Batches, where a ring cuts its queries into tiles of three."""
    with mock.patch.object(ring, "TILE_ROWS", 3):
        return inputs(case, only)


def _recorded(report: Report, model: Any, parallel: Any) -> None:
    for one in (model, parallel):
        one.set_attn_implementation("eager")
    got, want = (one(**batches.plain(2, 9), output_attentions=True) for one in (parallel, model))
    for mine, theirs in zip(got.attentions, want.attentions, strict=True):
        compare_plain(report, "attention", mine, theirs)
    for one in (model, parallel):
        one.set_attn_implementation("sdpa")


def _hidden(report: Report, model: Any, parallel: Any) -> None:
    got, want = (one(**batches.plain(2, 9), output_hidden_states=True) for one in (parallel, model))
    for mine, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        compare_plain(report, "hidden states", mine, theirs)
    # Nobody's keys and values of a part are given out.
    if got.get("past_key_values" if "past_key_values" in got else "cache") is not None:
        report.problems.append("a cache of a part of the sequence")


def _generates(report: Report, model: Any, parallel: Any) -> None:
    report.dtype = "float32"  # what generate() casts logits to
    with evaluating(model, parallel):
        for use_cache in (True, False):
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
            prompt = batches.left_padded_without_positions(3, 9)
            found = {n: prompt[n] for n in ("input_ids", "attention_mask")}
            ids = found.pop("input_ids")
            options |= {"use_cache": use_cache, **found}
            compare_generation(report, model, parallel, ids, **options)


def _chosen_later(report: Report, model: Any, parallel: Any, case: Case) -> None:
    if dict(case.parallelize):
        report.dtype = "float32"  # of the softmax in eager, which a ring does not call
    for name in ("eager", "sdpa"):
        for one in (model, parallel):
            one.set_attn_implementation(name)
        compare_once(report, model, parallel, batches.plain(2, 9), label=name)


def _uneven(report: Report, case: Case) -> None:
    """Six query heads on two ranks, two of three key/value heads for each."""
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 48, "head_dim": 8}
    model, parallel = pair(case.varied(model_kwargs=tuple(sizes.items())))
    compare_once(report, model, parallel, batches.plain(2, 9))


def _capped(report: Report, case: Case) -> None:
    """Gemma 2's eager attention, with sliding and full layers; its norms are float32."""
    report.dtype = "float32"
    model, parallel = pair(case.varied(family="gemma2", attn="eager"))
    compare_once(report, model, parallel, batches.plain(2, 17))


def plan_of(tp: int, cp: int, asked: Exchange) -> Plan:
    """The plan of a model with 8 query heads."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny.config("llama"))
    return derive_plan(model, tp, True, cp=cp, exchange=asked)


def influence(mode: str) -> tuple[list[int], list[int]]:
    """Positions whose logits change with token 3 of documents of 6, 3 and 5; and those that may."""
    parallel = parallelize(tiny.build("llama"), cp=dist.get_world_size(), cp_mode=mode).eval()
    batch = batches.packed((6, 3, 5))
    other = fresh(batch)
    other["input_ids"][0, 3] = (other["input_ids"][0, 3] + 1) % 96
    with torch.no_grad():
        one, two = (
            parallel(**{k: v for k, v in b.items() if k != "labels"}).logits for b in (batch, other)
        )
    return (one != two).any(-1)[0].nonzero().flatten().tolist(), [3, 4, 5]


REFUSALS = {
    "a split of no hybrid": ["cp_ulysses=2, cp_mode='ring'", "cp_mode='hybrid'"],
    "a hybrid of two": ["cannot be a ring of ranks", "cp_mode='ulysses'; cp_mode='ring'"],
    "soft caps in a ring": ["cannot attend around a ring", "softcap", "cp_mode='ulysses'"],
    "dropout in a ring": ["cannot attend around a ring", "dropout", "cp_mode='ulysses'"],
    "weights of a ring": ["output_attentions=True", "cp_mode='ulysses'"],
    "a mask of another form": ["ring attention cannot", "Tensor for", "cp_mode='ulysses'"],
    "a mesh": ["cp with a mesh of the user's", "leave mesh out"],
    "the world": ["cp=3", "2 ranks"],
    "a cache in training": ["was given a cache", "torch.no_grad()"],
    "compiled layers": ["are not compiled", "torch_compile=False"],
    "own attention": ["cannot be given a part of the sequence", "cp=1"],
}


def refusals() -> dict[str, tuple[str | None, bool]]:
    """What is said of each, and whether the model was left as it was."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = tiny.build("llama")
    parallel = parallelize(tiny.build("llama"), cp=2)
    ids = torch.arange(8)[None]
    around = parallelize(tiny.build("llama"), cp=2, cp_mode="ring")
    capped, drops = tiny.build("gemma2", attn="eager"), tiny.build("llama", attention_dropout=0.1)
    mask = torch.zeros(1, 1, 4, 8)
    own = tiny.build("llama")
    for layer in own.model.layers:
        layer.self_attn.__class__ = OwnAttention
    tries: dict[str, Callable[[], Any]] = {
        "a split of no hybrid": lambda: parallelize(model, cp=2, cp_mode="ring", cp_ulysses=2),
        "a hybrid of two": lambda: parallelize(model, cp=2, cp_mode="hybrid"),
        "soft caps in a ring": lambda: parallelize(capped, cp=2, cp_mode="ring"),
        "dropout in a ring": lambda: parallelize(drops, cp=2, cp_mode="ring"),
        "weights of a ring": lambda: around(input_ids=ids, output_attentions=True),
        "a mask of another form": lambda: around(input_ids=ids, attention_mask=mask),
        "a mesh": lambda: parallelize(model, cp=2, mesh=mesh),
        "the world": lambda: parallelize(model, cp=3),
        "a cache in training": lambda: parallel(input_ids=ids, past_key_values=DynamicCache()),
        "compiled layers": lambda: compile_layers(parallel),
        "own attention": lambda: parallelize(own, cp=2),
    }
    found = {}
    for name, run in tries.items():
        kept = {"own attention": own, "soft caps in a ring": capped}.get(name, model)
        kept = drops if name == "dropout in a ring" else kept
        before = dict(kept.named_parameters())
        message = None
        try:
            run()
        except HfSpError as error:
            message = str(error)
        found[name] = message, all(p is before[n] for n, p in kept.named_parameters())
    return found


class OwnAttention(LlamaAttention):
    """Looks at all tokens that it is given by itself."""

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, **kwargs: Any) -> Any:
        return self.o_proj(self.q_proj(hidden_states).cumsum(1)), None
