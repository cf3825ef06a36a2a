"""What a comparison with the unsharded model found, and how close is close enough.

Owns: errors, scales, tolerances. Must not know: models, ranks.

Tolerances
----------
float64, 1e-10. Parallel and unsharded model differ in the order of sums only. A sum of n numbers
carries an error of about eps * sqrt(n): 2e-16 * sqrt(100) = 2e-15 here, times a few for a dozen
operations in a row: 1e-14. What lies between 1e-14 and 1e-10 is room for other machines' kernels;
every fault worth the name is above 1e-4.

HF's RMSNorm computes in float32 whatever the dtype, and so rounds its input and its gradient to 24
bits. Where the two models agree bit for bit before that, nothing happens; where they differ by
1e-16 relative, the rounding swallows the difference, unless the value lies that close to a rounding
boundary: probability 1e-16 / 6e-8, about 2e-9 per element, and a few times that for differences of
a few eps. Then that one element differs by 6e-8, and the gradients by about 1e-9. The matrix rounds
about 2e7 elements, so about once in ten machines some cell would show such an error of 1e-9. It
could not come and go: the run is deterministic. The remedy for that cell is another seed.

float64 with float32 inside, 1e-6. Routers, norms over all heads and the weights of Gemma's norms
are computed in float32 whatever the dtype, and a rank has a part of the numbers: the sum of rounded
parts is not the rounded sum, by 2^-24 = 6e-8 of it, times the same few operations.

Scans of linear attentions, 1e-5. All of one is float32, and a rounding that falls otherwise goes
through the products of a chunk of tokens: about ten times that.

float32, 1e-5. 1.2e-7 * sqrt(100) * a few = 4e-6.

Relative to what
----------------
To the largest element of the reference tensor. Single elements have no scale of their own: they are
sums that cancel. Some gradients cancel as a whole: with one token the softmax is constant, and q's
and k's true gradients are zero. Their rounding error comes from terms of the size of the *other*
gradients of the block, so the scale is never taken below FLOOR = 1e-3 of the largest gradient in
the same module (self_attn, mlp, ...). That hides nothing: a fault in a gradient that is 1e-6 of its
block's is still judged to 1e-10 * 1e-3 / 1e-6 = 1e-7 of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
IN_FLOAT32 = 1e-6
IN_SCANS = 1e-5
FLOOR = 1e-3


@dataclass(frozen=True)
class Row:
    """One comparison: `error` is max|got - want| over `scale`."""

    what: str
    error: float
    scale: float


@dataclass
class Report:
    """What one rank found. `problems` are breaches of the contract, in words."""

    name: str
    rank: int = 0
    dtype: str = "float64"
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest error; infinite if nothing was compared."""
        return max((row.error for row in self.rows), default=float("inf"))

    def table(self, rows: int = 5) -> str:
        """The largest errors, one a line."""
        ordered = sorted(self.rows, key=lambda row: -row.error)[:rows]
        lines = [f"{row.error:10.2e}  of {row.scale:8.2e}  {row.what}" for row in ordered]
        return "\n".join([f"{self.name} (rank {self.rank}, {len(self.rows)} comparisons)", *lines])

    def compare(self, what: str, got: Tensor, want: Tensor, floor: float = 0.0) -> None:
        """Add a row.

        NaN anywhere but in both is an infinite error. Shapes and dtypes must agree.
        """
        got, want = got.detach(), want.detach()
        if got.shape != want.shape or got.dtype != want.dtype:
            self.problems.append(
                f"{what}: {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
            )
            return
        got, want = got.double(), want.double()
        if not torch.equal(got.isfinite(), want.isfinite()):
            self.rows.append(Row(what, float("inf"), 0.0))
            return
        got, want = (x.nan_to_num(0.0, 0.0, 0.0) for x in (got, want))
        scale = max(size(want), floor)
        difference = size(got - want)
        self.rows.append(
            Row(what, difference / scale if scale else (float("inf") if difference else 0.0), scale)
        )


def floors(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Of each gradient the least scale it is judged by: FLOOR of the largest in its module."""
    largest: dict[str, float] = {}
    for name, gradient in gradients.items():
        owner = _owner(name)
        largest[owner] = max(largest.get(owner, 0.0), FLOOR * size(gradient))
    return {name: largest[_owner(name)] for name in gradients}


def _owner(name: str) -> str:
    """`model.layers.0.self_attn` of `model.layers.0.self_attn.q_proj.bias`.

    A norm or the head is its own owner.
    """
    parts = name.split(".")
    end = parts.index("layers") + 3 if "layers" in parts else -1
    return ".".join(parts[:end])


def size(tensor: Tensor) -> float:
    """The largest absolute value."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0
