"""What ``verify`` found, as data and in words; the same on every rank."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from hf_sp.proof.report import Row


@dataclass
class Verification:
    """What ``verify`` found, the same on every rank; true if everything agrees.

    Attributes:
        rows: comparisons, the largest error first; an error is relative to the largest element.
        problems: what is no matter of rounding, in words.
        tolerance: the largest error that rounding explains; ``why`` says how it was derived.
        collectives: how many ran, in words.
        changed: dropouts that were set to zero for the comparison.
        unseen: what a comparison layer by layer does not show; empty if the whole was compared.
    """

    name: str
    tp: int
    sp: bool
    dtype: str
    tolerance: float
    why: str
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    collectives: str = ""
    changed: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.rows) and not self.problems and not self.wrong

    @property
    def wrong(self) -> list[Row]:
        """Comparisons that rounding does not explain, the worst first."""
        return [row for row in self.rows if not row.error <= self.tolerance]

    def as_data(self) -> dict[str, Any]:
        """For programs."""
        return {"agrees": bool(self), **asdict(self)}

    def __str__(self) -> str:
        worst = self.rows[0].error if self.rows else float("inf")
        lines = [
            f"{self.name}, tp={self.tp}, sp={self.sp}, {self.dtype}: "
            f"{'agrees' if self else 'DOES NOT AGREE'} with the unsharded model",
            f"  {len(self.rows)} comparisons, worst {worst:.1e}; rounding explains "
            f"{self.tolerance:.0e}: {self.why}",
            f"  collectives: {self.collectives}",
        ]
        lines += [f"  {row.error:.1e} {row.what}" for row in (self.wrong or self.rows)[:8]]
        lines += [f"  {problem}" for problem in self.problems]
        return "\n".join([*lines, *(f"  not shown layer by layer: {what}" for what in self.unseen)])


def agreed(found: Verification) -> Verification:
    """The first rank's comparisons and every rank's problems, on all ranks."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    first = everyone[0]
    for rank, other in enumerate(everyone[1:], 1):
        mine = (f"rank {rank}: {problem}" for problem in other.problems)
        first.problems += [p for p in mine if p.split(": ", 1)[1] not in first.problems]
    return first
