"""Files as Trainer and accelerate write them, read without executing anything."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import safe_globals

from hf_sp.checkpoint.ranks import listing
from hf_sp.errors import CheckpointError


def read_plain(path: Path) -> Any:
    """A file of ``torch.save``: tensors and plain data, and what the user has declared safe.

    Raises:
        CheckpointError: it holds anything else, or cannot be read.
    """
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "a file of the checkpoint cannot be read",
            where=str(path),
            got=type(error).__name__,
            rule="tensors and plain data, as Trainer or accelerate wrote them; nothing else is "
            "unpickled",
            remedy="resume from another checkpoint; classes of your own that are safe to make: "
            "torch.serialization.add_safe_globals",
        ) from error


def restore_random(python: Any, numpy: Any, cpu: Tensor, cuda: Any) -> None:
    """Set the random generators to what the first rank had.

    Args:
        python: as ``random.getstate`` returns it; ``numpy`` and ``cpu`` likewise.
        numpy: see above.
        cpu: see above.
        cuda: of one device, or a list of all, whose first is the first rank's; or None.
    """
    random.setstate(python)
    np.random.set_state(numpy)
    torch.random.set_rng_state(cpu)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda if isinstance(cuda, Tensor) else cuda[0])


def without_tied(model: nn.Module, missing: set[str]) -> set[str]:
    """Names that a file lacks, without those of a parameter that is there by another name."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    for names in owners.values():
        if names - missing:
            missing = missing - names
    return missing


def refuse_missing(names: set[str], where: str) -> None:
    """Raise CheckpointError if a checkpoint lacks weights of the model."""
    if names:
        raise CheckpointError(
            "the checkpoint lacks weights of the model",
            where=where,
            got=listing(sorted(names)),
            rule="a resumed model has all its weights from the checkpoint",
            remedy="resume from a checkpoint of this model",
        )
