"""Is a mixture-of-experts block one that can be split? Asked of what it computes, before anything.

Parts of an MoE block's output are summed over the ranks, and its gradients are sums of parts: right
only if the block is linear in what its experts return, treats each token by itself, and if the
experts are gated SiLU MLPs. A probe of each is run on small random tensors.
"""

from __future__ import annotations

from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sp.errors import PlanError
from hf_sp.model.lazy import LazyTensor
from hf_sp.plan.recognise import agrees, probe_of
from hf_sp.plan.schema import Block, Experts, Plan

_TOKENS, _CHOICES = 6, 2
_DTYPE = torch.float32  # whatever the default is when the model is made


def check_sparse_blocks(model: nn.Module, plan: Plan) -> None:
    """Refuse experts, routers and blocks that compute something else. Changes nothing.

    Raises:
        PlanError: naming the module.
    """
    known: dict[Any, bool] = {}

    def ask(module: nn.Module, question: Any, *args: Any) -> bool:
        settings = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
        forward = module.__dict__.get("forward")
        of = getattr(forward, "__func__", forward)
        key = (type(module), question, of, f"{settings} {module!r} {args}")
        if key not in known:
            known[key] = agrees(lambda: question(module, *args))
        return known[key]

    for block in plan.blocks:
        form = block.experts
        if form is None:
            continue
        module, experts = model.get_submodule(block.path), model.get_submodule(form.path)
        router = model.get_submodule(form.router)
        names = _names(block, form)
        if not ask(experts, _gated_experts, form.count):
            raise _refused(form.path, experts, "gate and up packed in halves, SiLU, no bias")
        if not ask(router, _tokenwise, form.count, form.hidden):
            rule = "(logits [T, E], weights [T, k], experts [T, k]) of each token by itself"
            raise _refused(form.router, router, rule)
        if not ask(module, _linear_block, names, form.hidden):
            rule = "router, experts and shared expert see the tokens as they are, and the output "
            rule += "is linear in what the experts return, token by token"
            raise _refused(block.path, module, rule)


def shared_expert_waits(module: nn.Module, block: Block) -> bool:
    """Whether a block leaves its shared expert's output alone until its experts have run.

    And whether its gradient comes back to where it was made, which autograd Functions between would
    not let it: asked with a stand-in of the kind that the shared expert will return.
    """
    form = block.experts
    assert form is not None
    return agrees(lambda: _leaves_alone(module, _names(block, form), form.hidden))


def _refused(where: str, module: nn.Module, rule: str) -> PlanError:
    return PlanError(
        "a part of a mixture-of-experts block computes something that hf_sp does not know",
        where=where,
        got=f"{type(module).__module__}.{type(module).__qualname__}",
        rule=rule,
    )


def _names(block: Block, form: Experts) -> tuple[str, str, str, str]:
    """Names of router, experts, shared expert and its gate in the block; "" for none."""

    def name(path: str) -> str:
        return path.removeprefix(block.path + ".") if path else ""

    gates = [leaf.path for leaf in block.leaves if leaf.style == "replicated"]
    return name(form.router), name(form.path), name(form.shared), name(gates[0] if gates else "")


def _forward(module: nn.Module, stand_in: nn.Module, *args: Any) -> Any:
    own = module.__dict__.get("forward")
    if isinstance(own, MethodType):
        return own.__func__(stand_in, *args)
    if own is not None:
        raise TypeError("a forward that is no method")
    return type(module).forward(stand_in, *args)


def _gated_experts(module: nn.Module, count: int) -> bool:
    if "forward" in module.__dict__:
        return False
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=_DTYPE).requires_grad_()

    hidden, f = 6, 5
    gate_up, down = random(count, 2 * f, hidden), random(count, hidden, f)
    x, scale, dy = random(_TOKENS, hidden), random(_TOKENS, _CHOICES), random(_TOKENS, hidden)
    index = (
        torch.rand(_TOKENS, count, generator=generator, dtype=_DTYPE)
        .topk(min(_CHOICES, count))
        .indices
    )
    scale = scale[:, : index.shape[1]].detach().requires_grad_()
    inner = {k: probe_of(m, {}, {}) for k, m in module._modules.items() if m is not None}
    stand_in = probe_of(module, {"gate_up_proj": gate_up, "down_proj": down}, inner)
    # Whichever implementation the user has chosen: this one defines what it computes.
    stand_in.__dict__["config"] = SimpleNamespace(_experts_implementation="eager")
    theirs = _forward(module, stand_in, x, index, scale)
    gate, up = torch.einsum("th,tkfh->tkf", x, gate_up[index]).chunk(2, -1)
    rows = torch.einsum("tkf,tkhf->tkh", F.silu(gate) * up, down[index])
    mine = (rows * scale[..., None]).sum(1)
    wanted = (x, scale, gate_up, down)
    pairs = [
        (theirs, mine),
        *zip(*(torch.autograd.grad(y, wanted, dy) for y in (theirs, mine)), strict=True),
    ]
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def _tokenwise(module: nn.Module, count: int, hidden: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    # Logits of size one: far larger ones leave probabilities that are zero, and no choice.
    # In float64, so that products of other sizes, which round differently, choose alike.
    double = torch.float64
    weight = torch.randn(count, hidden, generator=generator, dtype=double) / hidden**0.5
    x = torch.randn(_TOKENS, hidden, generator=generator, dtype=double)
    stand_in = probe_of(module, {"weight": weight}, dict(module._modules))
    before = dict(vars(stand_in))
    whole = _forward(module, stand_in, x)
    half = _forward(module, stand_in, x[: _TOKENS // 2])
    if vars(stand_in) != before or not isinstance(whole, tuple) or len(whole) != 3:
        return False
    logits, weights, index = whole
    shapes = logits.shape == (_TOKENS, count) and weights.shape == index.shape
    pairs = [(a[: _TOKENS // 2].double(), b.double()) for a, b in zip(whole, half, strict=True)]
    same = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
    return shapes and same and torch.allclose(logits, x @ weight.t())


class _Stub(nn.Module):
    """A part's place: notes what it is given and returns what it is told."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[tuple] = []

    def forward(self, *args: Any) -> Any:
        """Note the arguments."""
        self.seen.append(args)
        return self.answer


class _Late(LazyTensor):
    """A stand-in that has no gradient itself: only what is made has."""

    @staticmethod
    def __new__(cls, made: Tensor) -> _Late:
        """A tensor without storage."""
        return cls._stand_in(tuple(made.shape), made, lambda: made, made.detach(), torch.zeros_like)


def _leaves_alone(module: nn.Module, names: tuple[str, str, str, str], hidden: int) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=_DTYPE)

    router, experts, shared, gate = names
    x, routed, opened = random(2, _TOKENS // 2, hidden), random(_TOKENS, hidden), random(_TOKENS, 1)
    routing = (random(_TOKENS, 4), random(_TOKENS, _CHOICES), torch.ones(_TOKENS, _CHOICES).long())
    always, dy = random(_TOKENS, hidden).requires_grad_(), random(*x.shape)
    others = {k: m for k, m in module._modules.items() if k not in names and m is not None}

    def run(answer: Tensor, of_experts: _Stub) -> tuple[Tensor, Tensor]:
        stubs = {router: _Stub(routing), experts: of_experts, shared: _Stub(answer)}
        stubs |= {gate: _Stub(opened)} if gate else {}
        y = _forward(module, probe_of(module, {}, {**others, **stubs}), x.clone())
        return y, torch.autograd.grad(y, always, dy)[0]

    late, of_experts, touched = _Late(always), _Stub(routed), []
    of_experts.register_forward_hook(lambda *_: touched.append(late.made))
    pairs = zip(run(always, _Stub(routed)), run(late, of_experts), strict=True)
    return all(torch.equal(one, other) for one, other in pairs) and touched == [False]


def _linear_block(module: nn.Module, names: tuple[str, str, str, str], hidden: int) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=_DTYPE)

    router, experts, shared, gate = names
    x = random(2, _TOKENS // 2, hidden)
    routing = (random(_TOKENS, 4), random(_TOKENS, _CHOICES), torch.ones(_TOKENS, _CHOICES).long())
    opened = random(_TOKENS, 1)
    others = {k: m for k, m in module._modules.items() if k not in names and m is not None}
    if module._parameters or module._buffers or any(list(m.parameters()) for m in others.values()):
        return False

    def run(routed: Tensor, always: Tensor) -> Tensor:
        stubs = {router: _Stub(routing), experts: _Stub(routed)}
        stubs |= {shared: _Stub(always)} if shared else {}
        stubs |= {gate: _Stub(opened)} if gate else {}
        stand_in = probe_of(module, {}, {**others, **stubs})
        if hasattr(module, "jitter_noise"):
            stand_in.__dict__["jitter_noise"] = 0.0
        y = _forward(module, stand_in, x.clone())
        flat = x.view(_TOKENS, hidden)
        for name, stub in stubs.items():
            if len(stub.seen) != 1 or not torch.equal(stub.seen[0][0], flat):
                raise ValueError(f"{name} does not see the tokens")
        _, index, scale = stubs[experts].seen[0]
        if not torch.equal(index, routing[2]) or not torch.equal(scale, routing[1]):
            raise ValueError("the experts are not given the routing")
        return y

    one, two = random(_TOKENS, hidden), random(_TOKENS, hidden)
    nothing = torch.zeros(_TOKENS, hidden, dtype=_DTYPE)
    whole = run(one, two)
    apart = run(one, nothing) + run(nothing, two)
    first = one * (torch.arange(_TOKENS) == 0)[:, None]
    alone = run(first, nothing).reshape(_TOKENS, hidden)
    return (
        whole.shape == x.shape
        and not run(nothing, nothing).any()
        and torch.equal(run(2 * one, 2 * two), 2 * whole)
        and torch.allclose(apart, whole, atol=1e-5)
        and not alone[1:].any()
        and bool(alone[0].any())
    )
