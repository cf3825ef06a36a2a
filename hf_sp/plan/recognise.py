"""Which known maths a module computes: asked of the module, not of its name.

transformers has 205 classes called RMSNorm with 19 different forwards, and one tag for two of them
that round differently. So a copy of the module with random weights is run on rows that tell the
forms apart, and has to give the bits of one of them, and its gradients. What is not recognised
keeps its own forward, which is always right.

Must not know tensor parallelism.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_sp.kernels.norm import rms_norm
from hf_sp.kernels.swiglu import swiglu
from hf_sp.torch_private import real_tensors

logger = logging.getLogger(__name__)

Casting = Literal["llama", "gemma", "gpt_oss"]

# What a norm may compute: where it rounds, and what is added to its weight.
_CANDIDATES: tuple[tuple[Casting, float], ...] = (("llama", 0.0), ("gemma", 1.0), ("gpt_oss", 0.0))
_DTYPES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
)
# What a forward raises that is given tensors it was not written for.
_CANNOT_RUN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_DOUBLE = ((torch.float64, torch.float64),)


@dataclass(frozen=True, slots=True)
class NormForm:
    """An RMS norm's maths; arguments of ``hf_sp.kernels.rms_norm``.

    Args:
        casting: where it rounds.
        offset: added to the weight.
        eps: added to the mean square.
        float64: whether it agrees in float64 too, where the order of the casts shows.
    """

    casting: Casting
    offset: float
    eps: float
    float64: bool = False


@dataclass(frozen=True, slots=True)
class GatedForm:
    """Names of the linears of ``down(silu(gate(x)) * up(x))``."""

    gate: str
    up: str
    down: str


def norm_form(module: nn.Module) -> NormForm | None:
    """The form of a norm, None if it is none of the known ones.

    Recognised is a module with one parameter ``weight`` and no children, whose class's forward
    takes one tensor, leaves no trace on the module, and agrees with a form bit for bit in bfloat16
    and to rounding in float32, in the output and in both gradients, on rows of every size.
    """
    weight = module._parameters.get("weight")
    alone = len(module._parameters) == 1 and not module._modules and not module._buffers
    if weight is None or weight.dim() != 1 or not alone or not _takes_one_tensor(module):
        return None
    for eps in _small_numbers(module):
        for casting, offset in _CANDIDATES:
            form = NormForm(casting, offset, eps)
            compare = functools.partial(_compare_norm, module, weight.shape[0], form)
            if agrees(functools.partial(compare, _DTYPES)):
                exact = agrees(functools.partial(compare, _DOUBLE))
                return dataclasses.replace(form, float64=exact)
    return None


def gated_form(module: nn.Module, columns: list[str], row: str) -> GatedForm | None:
    """The form of a gated MLP, None if it computes something else.

    Args:
        module: the block.
        columns: names of its two column linears.
        row: name of its row linear.
    """
    if len(columns) != 2 or not _takes_one_tensor(module):
        return None
    for gate, up in (columns, columns[::-1]):
        form = GatedForm(gate, up, row)
        if agrees(functools.partial(_compare_gated, module, form)):
            return form
    return None


def _takes_one_tensor(module: nn.Module) -> bool:
    if "forward" in module.__dict__:
        return False  # somebody has put a forward of theirs on this instance
    return len(inspect.signature(module.forward).parameters) == 1


def _small_numbers(module: nn.Module) -> list[float]:
    """Candidates for eps: it is called eps, variance_epsilon, ..., and nothing else is as small."""
    floats = [v for v in vars(module).values() if isinstance(v, float) and 0 <= v < 0.1]
    return list(dict.fromkeys(floats))


def agrees(compare: Callable[[], bool]) -> bool:
    """Whether a comparison on a probe holds.

    A forward that cannot run on a probe (other shapes, arguments or children than it wants) is none
    that we know: the module keeps it. What it raised is logged, at debug level.
    """
    try:
        with real_tensors(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            return compare()
    except _CANNOT_RUN:
        logger.debug("a probe could not run", exc_info=True)
        return False


def probe_of(
    module: nn.Module, parameters: dict[str, Tensor], modules: dict[str, Any]
) -> nn.Module:
    """A training copy of the module alone, with other parameters and children, and no hooks."""
    probe = copy.copy(module)
    probe.__dict__.update(_parameters=dict(parameters), _modules=dict(modules), training=True)
    for name in [k for k in vars(probe) if k.endswith("_hooks")]:
        probe.__dict__[name] = type(vars(probe)[name])()
    return probe


def _rows(width: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """``[2, 8, width]``: rows of unit size, small enough for eps to count, large, and zero."""
    sizes = torch.tensor([1.0, 1.0, 1e-3, 1e-2, 30.0, 3e3, 1.0, 0.0]).unsqueeze(1)
    return (torch.randn(2, 8, width, generator=generator) * sizes).to(dtype)


def _compare_norm(
    module: nn.Module,
    width: int,
    form: NormForm,
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...],
) -> bool:
    generator = torch.Generator().manual_seed(0)
    for dtype, weight_dtype in dtypes:
        weight = (1 + torch.randn(width, generator=generator)).to(weight_dtype)
        x = _rows(width, dtype, generator)
        dy = torch.randn(x.shape, generator=generator)
        results = []
        for ours in (False, True):
            w, rows = weight.clone().requires_grad_(), x.clone().requires_grad_()
            if ours:
                y = rms_norm(
                    rows, w, form.eps, offset=form.offset, casting=form.casting, triton=False
                )
            else:
                probe = probe_of(module, {"weight": w}, {})
                before = dict(vars(probe))
                y = type(module).forward(probe, rows)
                if vars(probe) != before:
                    return False  # it remembers something: a stand-in would not
            results.append((y, *torch.autograd.grad(y, (rows, w), dy.to(y.dtype))))
        theirs, mine = results
        if theirs[0].dtype != mine[0].dtype or theirs[0].shape != mine[0].shape:
            return False
        if dtype == torch.bfloat16 and not torch.equal(theirs[0], mine[0]):
            return False
        if dtype != torch.bfloat16 and not all(map(_close, theirs, mine)):
            return False
    return True


def _close(theirs: Tensor, mine: Tensor) -> bool:
    # Each row on its own scale: a few roundings of width terms.
    tolerance = 1e-5 if theirs.dtype == torch.float32 else 1e-13
    size = theirs.abs().amax(-1, keepdim=True)
    return bool(((theirs - mine).abs() <= tolerance * size).all())


class _Stub(nn.Module):
    """A linear's place: notes what it is given, returns what it is told, or its input."""

    def __init__(self, answer: Tensor | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """Note x."""
        self.seen.append(x)
        return x.clone() if self.answer is None else self.answer


def _compare_gated(module: nn.Module, form: GatedForm) -> bool:
    generator = torch.Generator().manual_seed(0)
    linears = (form.gate, form.up, form.down)
    others = {k: m for k, m in module._modules.items() if k not in linears and m is not None}
    weighted = any(list(m.parameters()) or m._modules for m in others.values())
    if module._parameters or module._buffers or weighted:
        return False
    # In training mode: dropout that is off while the model is in eval is seen too.
    others = {k: probe_of(m, {}, {}) for k, m in others.items()}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(2, 3, 4, generator=generator).to(dtype)
        gate, up = (8 * torch.randn(2, 2, 3, 256, generator=generator)).to(dtype)
        gate.requires_grad_()
        up.requires_grad_()
        stubs = {form.gate: _Stub(gate), form.up: _Stub(up), form.down: _Stub()}
        probe = probe_of(module, {}, {**others, **stubs})
        before = dict(vars(probe))
        y = type(module).forward(probe, x)
        wired = all(
            len(stub.seen) == 1 and (stub.answer is None or stub.seen[0] is x)
            for stub in stubs.values()
        )
        if not wired or vars(probe) != before:
            return False
        product = swiglu(gate, up, triton=False)
        dy = torch.randn(y.shape, generator=generator).to(dtype)
        theirs = torch.autograd.grad(y, (gate, up), dy)
        mine = torch.autograd.grad(product, (gate, up), dy)
        if dtype == torch.bfloat16 and not torch.equal(y, product):
            return False
        if dtype == torch.float32:
            pairs = [(y, product), *zip(theirs, mine, strict=True)]
            if not all(_close(a.detach(), b.detach()) for a, b in pairs):
                return False
    return True
