"""Who is measured: our kernels, and others' for the same operation on the same tensors.

Owns how each is called. Must not know how calls are timed or judged. Each is called as its own
users call it, through autograd where it has one; what it needs is imported when it is made, and
whatever goes wrong then is its result and not the end of the run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.bench._kernels.cases import EPS, FLOORS, IGNORED, Case, Data

Results = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A call to be timed, and what has to be done once before, on the stream it will run on."""

    run: Callable[[], Results]
    setup: Callable[[], None] | None = None


Steps = dict[str, Step]


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute.

    Attributes:
        name: as printed.
        make: from the data, its steps; a step that it has not is left out.
        package: import name of what it needs, None for torch and transformers.
        spoils: whether it writes over its inputs or the incoming gradients.
        ours: whether it has to run our Triton kernels where they can run.
        checked: whether it computes the operation at all.
        needs_gpu: whether it cannot run on a CPU, in the interpreter neither.
        only: its steps, if they are not the operation's.
    """

    name: str
    make: Callable[[Data], Steps]
    package: str | None = None
    spoils: bool = False
    ours: bool = False
    checked: bool = True
    needs_gpu: bool = False
    only: tuple[str, ...] = ()

    def steps(self, op: str) -> list[str]:
        """The steps of an operation that it has."""
        if self.only:
            return list(self.only)
        if op != "ce" or self.name == COPY:
            return list(FLOORS[op])
        whole = [self.make is not _ours_direct]
        return [step for step in FLOORS[op] if (step == "forward+backward") in whole]

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot take part, as a status; None if it can."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return "not installed"
        if self.needs_gpu and device.type != "cuda":
            return "not run: needs a GPU"
        return None


OURS, DIRECT, COPY = "ours", "ours, no autograd", "copy of as many bytes"
# Those that ours must not be slower than.
RIVALS = ("F.rms_norm", "torch.compile", "Liger", "Liger vocab-parallel")


def contenders(op: str) -> list[Contender]:
    """Everyone who computes an operation."""
    liger = {"package": "liger_kernel", "needs_gpu": True}
    quack = {"package": "quack", "needs_gpu": True}
    direct = Contender(DIRECT, _ours_direct, ours=True)
    hf, compiled = Contender("HF eager", _hf), Contender("torch.compile", _compiled)
    copy = Contender(COPY, _copy, checked=False)
    if op == "ce":
        return [
            Contender(OURS, _ours, ours=True),
            direct,
            hf,
            compiled,
            Contender("Liger", _liger, spoils=True, **liger),
            Contender("Liger vocab-parallel", _liger_vocab_parallel, **liger),
            Contender("quack", _quack, spoils=True, **quack),
            copy,
        ]
    ours = Contender(OURS, _ours, ours=True)
    if op == "swiglu":
        # Liger's backward writes over what the forward saved.
        return [ours, direct, hf, compiled, Contender("Liger", _liger, spoils=True, **liger), copy]
    # Liger's norm writes dx over dy by default.
    return [
        ours,
        direct,
        hf,
        Contender("F.rms_norm", _torch_norm),
        compiled,
        Contender("Liger", _liger, spoils=True, **liger),
        Contender("quack", _quack, **quack),
        copy,
    ]


def floor_bytes(case: Case, step: str) -> int:
    """The fewest bytes that a step can move."""
    return FLOORS[case.op][step] * case.rows * case.n


def by_autograd(data: Data, function: Callable[..., Any]) -> Steps:
    """The steps of a differentiable function of the data's inputs."""
    inputs, grads = data.inputs, data.grads
    made: list[Results] = []

    def forward() -> Results:
        results = function(*inputs)
        return results if isinstance(results, tuple) else (results,)

    def setup() -> None:
        made[:] = [forward()]

    def backward() -> Results:
        return torch.autograd.grad(made[0], inputs, grads, retain_graph=True)

    def both() -> Results:
        results = forward()
        return *results, *torch.autograd.grad(results, inputs)

    def recompute() -> Results:
        results = forward()
        return *torch.autograd.grad(results, inputs, grads), *results

    if data.case.op == "ce":
        return {"forward+backward": Step(both)}
    steps = {"forward": Step(forward), "backward": Step(backward, setup)}
    if data.case.op == "swiglu":
        steps["recompute"] = Step(recompute)
    return steps


# --- ours ---------------------------------------------------------------------------------------


def _ours(data: Data) -> Steps:
    from hf_sp.kernels.cross_entropy import vocab_parallel_cross_entropy
    from hf_sp.kernels.norm import rms_norm
    from hf_sp.kernels.swiglu import swiglu

    def loss(logits: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits, data.labels, reduction="sum")

    functions = {
        "norm": lambda x, w: rms_norm(x, w, EPS),
        "swiglu": swiglu,
        "ce": loss,
    }
    steps = by_autograd(data, functions[data.case.op])
    if "recompute" in steps:
        steps["recompute"] = _ours_direct(data)["recompute"]  # as the MLP's backward calls it
    return steps


def _ours_direct(data: Data) -> Steps:
    """What others' autograd functions call: no graph, less Python around a launch."""
    if data.case.op == "ce":
        return our_loss_kernels(data)
    from hf_sp.kernels import norm
    from hf_sp.kernels.swiglu import swiglu_backward, swiglu_forward

    inputs, grads = [x.detach() for x in data.inputs], data.grads
    if data.case.op == "swiglu":
        gate, up = inputs
        return {
            "forward": Step(lambda: (swiglu_forward(gate, up),)),
            "backward": Step(lambda: swiglu_backward(grads[0], gate, up)[:2]),
            "recompute": Step(lambda: swiglu_backward(grads[0], gate, up, product=True)),
        }
    x, w = inputs
    rstd: list[Tensor] = []

    def setup() -> None:
        rstd[:] = norm.rms_norm_forward(x, w, EPS)[1:]

    def backward() -> Results:
        return norm.rms_norm_backward(grads[0], x, *rstd, w, EPS)

    forward = Step(lambda: norm.rms_norm_forward(x, w, EPS)[:1])
    return {"forward": forward, "backward": Step(backward, setup)}


def our_loss_kernels(data: Data, **configs: Any) -> Steps:
    """The two kernels of the loss, one step each, with launch settings by the name of the step."""
    from hf_sp.kernels import cross_entropy_steps as steps

    logits, labels = data.inputs[0].detach(), data.labels
    terms = steps.LossTerms(vocab=data.case.n, ignore_index=IGNORED)
    made: list[Any] = []

    def combined(config: Any) -> Any:
        mine = steps.token_statistics(logits, labels, terms, config)
        return steps.combine(steps.share(mine, None), labels, terms)

    def setup() -> None:
        made[:] = [combined(None), torch.empty_like(logits)]

    def gradient() -> Results:
        config = configs.get("gradient")
        return (steps.write_gradient(logits, labels, made[0], terms, out=made[1], config=config),)

    return {
        "statistics": Step(lambda: (combined(configs.get("statistics")).loss.sum(),)),
        "gradient": Step(gradient, setup),
    }


# --- others -------------------------------------------------------------------------------------


def _hf_function(data: Data) -> Callable[..., Any]:
    """The operation as transformers' models write it."""
    if data.case.op == "ce":
        from transformers.loss.loss_utils import ForCausalLMLoss

        # With a number of items it takes the sum, and divides by that.
        return lambda logits: ForCausalLMLoss(
            logits, None, data.case.n, num_items_in_batch=1, shift_labels=data.labels
        )
    if data.case.op == "swiglu":
        from transformers.activations import ACT2FN

        act = ACT2FN["silu"]
        return lambda gate, up: act(gate) * up
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(data.case.n, eps=EPS)
    norm.weight = data.inputs[-1]
    return lambda x, w: norm(x)


def _hf(data: Data) -> Steps:
    return by_autograd(data, _hf_function(data))


def _compiled(data: Data) -> Steps:
    # Shapes compiled before must not count against the limit on recompilations, past which it would
    # silently run in eager. On a CPU only the tracing is tried: what Inductor would make of it
    # there says nothing about a GPU.
    torch.compiler.reset()
    backend = "inductor" if data.inputs[0].is_cuda else "aot_eager"
    function = _hf_function(data)
    return by_autograd(data, torch.compile(function, dynamic=False, backend=backend))


def _torch_norm(data: Data) -> Steps:
    size = [data.case.n]
    return by_autograd(data, lambda x, w: F.rms_norm(x, size, w, EPS))


def _liger(data: Data) -> Steps:
    if data.case.op == "ce":
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        options = (None, IGNORED, 0.0, 0.0, "sum")
        return by_autograd(
            data, lambda x: LigerCrossEntropyFunction.apply(x, data.labels, *options)[0]
        )
    if data.case.op == "swiglu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return by_autograd(data, LigerSiLUMulFunction.apply)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return by_autograd(data, lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama"))


def _liger_vocab_parallel(data: Data) -> Steps:
    from liger_kernel.ops.vocab_parallel_cross_entropy import LigerVocabParallelCEFunction

    labels = data.labels
    assert labels is not None
    options = (None, IGNORED, 0.0, "pytorch", "global")
    return by_autograd(
        data,
        lambda x: LigerVocabParallelCEFunction.apply(x[:, None], labels[:, None], *options).sum(),
    )


def _quack(data: Data) -> Steps:
    if data.case.op == "ce":
        from quack import cross_entropy

        return by_autograd(
            data,
            lambda x: cross_entropy(
                x, data.labels, ignore_index=IGNORED, reduction="sum", inplace_backward=True
            ),
        )
    from quack import rmsnorm

    return by_autograd(data, lambda x, w: rmsnorm(x, w, eps=EPS))


def _copy(data: Data) -> Steps:
    """What the memory takes for a step's bytes at this size: below it no kernel gets."""

    def step(name: str) -> Step:
        made: list[Tensor] = []

        def setup() -> None:
            size = floor_bytes(data.case, name) // 2
            source = torch.ones(size, dtype=torch.uint8, device=data.inputs[0].device)
            made[:] = [torch.empty_like(source), source]

        return Step(lambda: (made[0].copy_(made[1]),), setup)

    return {name: step(name) for name in FLOORS[data.case.op]}
