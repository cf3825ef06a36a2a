"""What is measured: operations, shapes, their floors in bytes, their inputs.

Owns the sizes and the random data. Must not know who computes (``contenders``), what is right
(``oracle``) or how it is timed (``clock``).

Groups, in the order in which they run, so that what time runs out for is the least of it:

========= ======================================================================================
norm      RMSNorm, the rows of one to sixteen sequences of 8192
sp        RMSNorm at the rows a rank has left under sequence parallelism, in CUDA graphs: kernels of
          2 to 16 us, where launches decide
ce        cross entropy of 8192 tokens, whole vocabulary and one rank's part of a larger one
qnorm     RMSNorm over heads of 128
swiglu    silu(gate) * up, whole and one rank's part
========= ======================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

EPS = 1e-6
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape.

    Attributes:
        group: what ``--only`` selects by.
        op: ``norm``, ``swiglu`` or ``ce``.
        rows: rows, or tokens.
        n: elements of a row: hidden size, intermediate size, vocabulary.
        graph: whether it is timed as a replay of a CUDA graph.
    """

    group: str
    op: str
    rows: int
    n: int
    graph: bool = False

    @property
    def shape(self) -> str:
        """As printed."""
        return f"{self.rows}x{self.n}"


# What is timed of each operation, with the fewest bytes of bf16 that it can move per element: each
# input read once, each result written once. 4 bytes a row (rstd, loss) are left out.
FLOORS: dict[str, dict[str, int]] = {
    "norm": {"forward": 4, "backward": 6},
    # recompute: the backward that makes the product again, which was not kept.
    "swiglu": {"forward": 6, "backward": 10, "recompute": 12},
    # read for the statistics, read and write for the gradient.
    "ce": {"forward+backward": 6, "statistics": 2, "gradient": 4},
}

_ROWS, _HIDDEN = (8192, 32768), (4096, 5120, 8192)


def _grid(group: str, op: str, shapes: list[tuple[int, int]], graph: bool = False) -> list[Case]:
    return [Case(group, op, rows, n, graph) for rows, n in shapes]


def all_cases() -> list[Case]:
    """Every case of a full run."""
    usual = [(rows, n) for rows in _ROWS for n in _HIDDEN]
    long = [(131072, n) for n in _HIDDEN]
    local = [(1024, 4096), (1024, 8192), (2048, 4096), (2048, 8192)]
    vocab = [(8192, 131072), (8192, 18992)]
    return [
        *_grid("norm", "norm", usual),
        *_grid("sp", "norm", local, graph=True),
        *_grid("ce", "ce", vocab),
        *_grid("qnorm", "norm", [(327680, 128)]),
        *_grid("swiglu", "swiglu", [(8192, 14336), (32768, 14336), (8192, 3584)]),
        *_grid("norm", "norm", long),
    ]


def tiny_cases() -> list[Case]:
    """One of each group, for a dry run: widths that fill no tile, ragged rows.

    The backward's loop over rows has to go round more than once, also in a program that has fewer
    of them than its neighbour.
    """
    return [
        *_grid("norm", "norm", [(37, 200)]),
        *_grid("sp", "norm", [(19, 256)], graph=True),
        *_grid("ce", "ce", [(13, 1003)]),
        *_grid("qnorm", "norm", [(75, 128)]),
        *_grid("swiglu", "swiglu", [(21, 360)]),
    ]


GROUPS = tuple(dict.fromkeys(case.group for case in all_cases()))


def chosen(cases: list[Case], only: str | None) -> list[Case]:
    """The cases of some groups.

    Args:
        cases: all of them.
        only: names of groups with commas between, None for all.

    Raises:
        ValueError: a name that is none.
    """
    if only is None:
        return cases
    names = [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise ValueError(f"no group {', '.join(unknown)}; legal: {', '.join(GROUPS)}")
    return [case for case in cases if case.group in names]


@dataclass(slots=True)
class Data:
    """What every contender of a case is given.

    Attributes:
        case: the case.
        inputs: leaves that require gradients; norm ``(x, w)``, swiglu ``(gate, up)``, ce
            ``(logits,)``.
        grads: gradients of the results, in their order.
        labels: of the tokens, for ce.
    """

    case: Case
    inputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    labels: Tensor | None = None
    _kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def keep(self) -> None:
        """Remember the values, for contenders that write over what they were given."""
        if not self._kept:
            self._kept = [(x, x.detach().clone()) for x in (*self.inputs, *self.grads)]

    def restore(self) -> None:
        """Put them back, where they lie."""
        for x, before in self._kept:
            # Through .data: autograd would refuse a backward over inputs that changed, and with
            # good reason. Here they change back.
            x.data.copy_(before)


def make_data(case: Case, device: torch.device) -> Data:
    """Random inputs, the same in each run; never zeros, on which hardware is faster."""
    generator = torch.Generator(device).manual_seed(case.rows * 1_000_003 + case.n)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)

    rows, n = case.rows, case.n
    if case.op == "ce":
        # Peaked as logits are: with 0 everywhere the softmax would be flat.
        logits = normal(rows, n).mul_(4)
        labels = torch.randint(n, (rows,), generator=generator, device=device)
        # The ends of the range, and one token that does not count: too few to save time.
        labels[0], labels[1], labels[2] = IGNORED, 0, n - 1
        return Data(case, (logits.requires_grad_(),), (), labels)
    inputs = [normal(rows, n) for _ in range(2 if case.op == "swiglu" else 1)]
    if case.op == "norm":
        # A parameter, so that modules can take it as theirs.
        inputs.append(nn.Parameter(normal(n).mul_(0.2).add_(1)))
    return Data(case, tuple(x.requires_grad_() for x in inputs), (normal(rows, n),))
