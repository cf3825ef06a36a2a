"""The exceptions that hf_sp raises, and the form of their messages."""

from __future__ import annotations


class HfSpError(ValueError):
    """Base of all refusals: a message of named parts, in a fixed order.

    Args:
        what: one sentence, what cannot be done.
        where: the module, parameter, argument or file it is about.
        got: the value that was met.
        rule: the rule it breaks.
        legal: the values that would be accepted.
        remedy: what to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        got: str = "",
        rule: str = "",
        legal: str = "",
        remedy: str = "",
    ) -> None:
        parts = {"where": where, "got": got, "rule": rule, "legal": legal, "remedy": remedy}
        lines = [what]
        for label, text in parts.items():
            if text:
                head, *rest = text.splitlines()
                lines.append(f"  {label + ':':<8}{head}")
                lines.extend(f"          {line}" for line in rest)
        super().__init__("\n".join(lines))


class ConfigError(HfSpError):
    """An argument, environment or model setting that hf_sp cannot work with."""


class PlanError(HfSpError):
    """The model has no parallel plan that hf_sp can carry out, or tp cannot divide it."""


class ShapeError(HfSpError):
    """A tensor whose shape or values do not fit, met while the model runs."""


class BatchMismatchError(HfSpError):
    """The ranks of one tensor-parallel group were given different batches."""


class CheckpointError(HfSpError):
    """A checkpoint that does not fit the parallel model, or could not be written."""


class ReplicaError(HfSpError):
    """Copies on several ranks that have to be equal and are not."""
