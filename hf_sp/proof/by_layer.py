"""The comparison of ``verify`` one decoder layer at a time, where the whole does not fit.

The unsharded model runs forward once, layer by layer, and keeps what goes from each to the next;
then back from the loss. Both forms of a layer are given the same input, and the same gradient of
its output. The first layer comes with the ends: embedding, final norm, head and loss.

Shape letters: B batch, S sequence, s = S / tp, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sp import checks
from hf_sp.api import parallelize
from hf_sp.comm import collectives as comm
from hf_sp.errors import ConfigError
from hf_sp.estimate import StepAccounting
from hf_sp.plan import Plan, derive_plan
from hf_sp.proof import runs
from hf_sp.proof.expected import differences, layout_of, tolerance_of
from hf_sp.proof.handed import at_layer, at_norm, decode
from hf_sp.proof.pieces import Source, freed, plan_of_piece
from hf_sp.proof.report import Report
from hf_sp.proof.runs import Batch, Ran, Truth
from hf_sp.state import parallel_state

UNSEEN = (
    "what one layer's collectives and hooks do to another layer",
    "how rounding grows over the depth: each layer is given the unsharded one's input",
    "gradients that a layer is sent from elsewhere than the next one: the routers' auxiliary loss",
)
"""What it does not show, and a comparison of the whole model would."""


def plan_of(source: Source, tp: int, sp: bool, options: Mapping[str, Any]) -> Plan:
    """The plan of the whole model.

    Raises:
        ConfigError: its layers meet in other ways than by hidden states; with what to do instead.
        PlanError: it is not supported.
    """
    adapters = source.model is not None and runs.has_adapters(source.model)
    _refuse("adapters" if adapters else "cp" if options.get("cp", 1) > 1 else None)
    checks.check_model(source.shapes)
    plan = derive_plan(source.shapes, tp, sp, options.get("plan"), options.get("ep", 1))
    shared = getattr(source.config.get_text_config(), "num_kv_shared_layers", 0)
    _refuse("layers that share keys, or have inputs by token" if plan.per_token or shared else None)
    return plan


def _refuse(met: str | None) -> None:
    if met is not None:
        raise ConfigError(
            "such a model is not compared layer by layer",
            where="verify(layers=True)",
            got=met,
            rule="a layer is given hidden states alone, all of them",
            legal="layers=False; models without adapters and cp, whose layers share nothing",
            remedy="compare it whole, with fewer layers (hf-sp verify NAME --layers 2)",
        )


def compare_layers(
    source: Source,
    plan: Plan,
    batch: Batch,
    report: Report,
    options: Mapping[str, Any],
    told: Callable[[str], None],
) -> tuple[float, str, Ran]:
    """Compare each layer; the tolerance with its reason, and the collectives that ran.

    Memory of a rank: one layer, the first one with the ends; gradients of it on the first rank; a
    shard of it with gradients; the hidden states between all layers on the first rank.
    """
    first, inputs = dist.get_rank() == 0, runs.on(batch)
    if hasattr(source.config.get_text_config(), "output_router_logits"):
        inputs["output_router_logits"] = False
    between, gradient = _between(source, plan, inputs, told) if first else ([], None)
    source.returned = _told_by_first(source.returned)
    tolerance, why, ran = 0.0, "", []
    for layer in reversed(range(len(plan.layers))):
        told(f"comparing layer {layer}")
        with freed():
            ends = () if layer else (between[-1] if first else None,)
            mine = (between[layer] if first else None, gradient, *ends)
            given = _Given(*(_share(x, source.dtype) for x in mine))
            piece = _Piece(source, plan, layer, inputs, given)
            want = piece.truth() if first else None
            if want is not None:
                gradient = want.results.get(piece.of_input)
                gradient = None if gradient is None else gradient.to(runs.device())
            found, reason, more = piece.compare(report, want, options)
            ran += more
            tolerance, why = max((tolerance, why), (found, reason))
            del piece, want
    return tolerance, why, ran


@dataclass
class _Given:
    """What both forms of a layer are given: its input ``[B, S, H]``, the gradient of its output.

    The first also has the last layer's output.
    """

    x: Tensor
    gradient: Tensor
    last: Tensor | None = None


class _Piece:
    """One layer with its ends, or without: unsharded, and then parallel in place."""

    def __init__(
        self, source: Source, plan: Plan, layer: int, inputs: dict[str, Any], given: _Given
    ) -> None:
        self.plan, self.layer, self.inputs, self.given = plan, layer, inputs, given
        self.source, self.path, self.dtype = source, plan.layers[layer], source.dtype
        self.model: Any = source.piece(plan, layer)
        self.of_input = f"gradient of the input of {self.path}"
        # Of a sequence that is whole on this rank, until it is sharded.
        self.cut: Callable[[Tensor], Tensor] = lambda x: x
        self.join: Callable[[Tensor], Tensor] = lambda x: x

    def truth(self) -> Truth:
        """What the unsharded layer makes."""
        self.model.to(runs.device())
        with runs.as_judge(self.model):
            found, _ = self._run()
        gradients = runs.take_gradients(self.model)
        return Truth({what: x.cpu() for what, x in found.items()}, gradients)

    def compare(
        self, report: Report, want: Truth | None, options: Mapping[str, Any]
    ) -> tuple[float, str, Ran]:
        """Make it parallel, and compare."""
        plan = self.plan
        styles = plan_of_piece(self.model, options.get("plan"))
        parallel = parallelize(self.model, plan.tp, plan.sp, **{**options, "plan": styles})
        state = parallel_state(parallel)
        assert state is not None
        if state.sp:
            axis, length = state.axis, self.given.x.shape[1]
            self.cut = lambda x: comm.own_shard(x, axis)
            self.join = lambda x: comm.gather_sequence(x, length, axis)
        told = layout_of(parallel, state, self.inputs, self.dtype)
        inner = [c for stage in told.layers[self.layer].stages for c in stage.collectives]
        before = len(report.problems)
        found, ran = self._run()
        runs.compare_run(report, parallel, state, found, want)
        if not self.layer:
            runs.compare_ranks(report, found["loss"])
        ends = [] if self.layer else [*told.begin.collectives, *told.end.collectives]
        report.problems += differences(ran, [*inner, *ends])
        report.problems[before:] = [f"{self.path}: {p}" for p in report.problems[before:]]
        return *tolerance_of(parallel, state, self.dtype), ran

    def _run(self) -> tuple[dict[str, Tensor], Ran]:
        """Results by name, whole on each rank, and the collectives of the layer (and the ends)."""
        core, given = self.model, self.given
        leaf = self.cut(given.x).detach().requires_grad_() if self.layer else None
        handed = contextlib.nullcontext([]) if self.layer else self._hand_on()
        with StepAccounting() as accounting:
            layer = at_layer(self.source, core.get_submodule(self.path), leaf, accounting)
            with layer as met, handed as late:
                if self.layer:
                    decode(core, self.plan, self.inputs, given.x)
                    (output,) = met.outputs
                    accounting.phase = "backward"
                    back = len(accounting.records)
                    output.backward(self.cut(given.gradient))
                else:
                    loss = core(**self.inputs).loss
                    accounting.phase = "backward"
                    met.marks, back = [0, len(accounting.records)], len(accounting.records)
                    loss.backward()
            ran = runs.collectives(accounting, *met.marks) + runs.collectives(accounting, back)
        found = {f"output of {self.path}": self.join(met.outputs[0].detach())}
        if leaf is not None:
            assert leaf.grad is not None
            return {**found, self.of_input: self.join(leaf.grad)}, ran
        found["loss"] = loss.detach()
        found |= {f"gradient of the input of {self.plan.norm}": self.join(x) for x in late}
        with self._hand_on():
            found["logits of an evaluation"] = runs.logits_of(core, self.inputs)
        return found, ran

    def _hand_on(self) -> Any:
        given = self.given
        assert given.last is not None
        return at_norm(self.model, self.plan, self.cut(given.last), self.cut(given.gradient))


def _between(
    source: Source, plan: Plan, inputs: dict[str, Any], told: Callable[[str], None]
) -> tuple[list[Tensor], Tensor]:
    """Of the unsharded model: each layer's input, and the last one's output with its gradient."""
    found: list[Tensor] = []
    for layer, path in enumerate(plan.layers):
        told(f"the unsharded layer {layer}")
        with freed(), torch.no_grad():
            model: Any = source.piece(plan, layer).to(runs.device())
            x = found[-1] if layer else None
            with at_layer(source, model.get_submodule(path), x) as met:
                decode(model, plan, inputs, x)
            found += met.outputs if layer else [*met.inputs, *met.outputs]
            del model, met
    with freed():
        model = source.piece(plan, 0).to(runs.device()).requires_grad_(False)
        leaf = found[-1].clone().requires_grad_()
        norm: Any = model.get_submodule(plan.norm)
        norm.register_forward_pre_hook(lambda module, args: (leaf, *args[1:]))
        with runs.as_judge(model):
            (gradient,) = torch.autograd.grad(model(**inputs).loss, leaf)
        del model
    return found, gradient


def _told_by_first(x: Any) -> Any:
    box = [x]
    dist.broadcast_object_list(box)
    return box[0]


def _share(x: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The first rank's tensor, on all."""
    shape = _told_by_first(None if x is None else tuple(x.shape))
    x = torch.empty(shape, dtype=dtype, device=runs.device()) if x is None else x.contiguous()
    dist.broadcast(x, 0)
    return x
