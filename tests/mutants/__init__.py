"""Deliberate faults: each must turn a check red. `registry` holds them all, by name."""

from mutants import (
    adapters,
    context,
    dense,
    embedding_and_loss,
    experts,
    families,
    fsdp,
    loading,
    memory,
    mixers,
    partial_gradients,
    trl,
)
from mutants.registry import MUTANTS, Mutant, applied

__all__ = [
    "MUTANTS",
    "Mutant",
    "adapters",
    "applied",
    "context",
    "dense",
    "embedding_and_loss",
    "experts",
    "families",
    "fsdp",
    "loading",
    "memory",
    "mixers",
    "partial_gradients",
    "trl",
]
