"""Divisibility: which tp a model can be split by, all problems told at once."""

from __future__ import annotations

from dataclasses import dataclass

from hf_sp.errors import PlanError


@dataclass(frozen=True, slots=True)
class Divisor:
    """A size that tp has to divide.

    Args:
        name: what the size is called in the model's config.
        size: the size.
        path: the module that has it.
        replicable: whether tp may also be a multiple of it (key/value heads are then replicated).
    """

    name: str
    size: int
    path: str
    replicable: bool = False

    def allows(self, tp: int) -> bool:
        """Whether this size can be split over ``tp`` ranks."""
        return self.size % tp == 0 or (self.replicable and tp % self.size == 0)


def legal_tps(divisors: list[Divisor]) -> list[int]:
    """Every tp that all sizes allow, up to the smallest that cannot be replicated."""
    largest = min((d.size for d in divisors if not d.replicable), default=1)
    return [tp for tp in range(1, largest + 1) if all(d.allows(tp) for d in divisors)]


def check_divisible(model: str, tp: int, divisors: list[Divisor]) -> None:
    """Refuse a ``tp`` that does not divide, naming each size once and the legal values.

    Raises:
        PlanError: some size is not divisible.
    """
    bad: dict[tuple[str, int], str] = {}
    for d in divisors:
        if not d.allows(tp):
            bad.setdefault((d.name, d.size), d.path)
    if not bad:
        return
    raise PlanError(
        f"tp={tp} cannot shard {model}",
        where="\n".join(bad.values()),
        got="\n".join(f"{name}={size}, {size} % {tp} = {size % tp}" for name, size in bad),
        rule="tp must divide the query heads and the intermediate size, and divide the key/value "
        "heads or be a multiple of them",
        legal="tp = " + ", ".join(map(str, legal_tps(divisors))),
    )
