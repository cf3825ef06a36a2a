"""What is imported, out of the collector's sight; for processes without hf_sp too."""

from __future__ import annotations

import gc
import sys


def freeze_imports() -> None:
    """What is imported stays: spare later collections, and walks over the live objects, of it.

    Again when more is imported. Counting bytes collects before and after each step, and
    ``parallelize`` looks for optimizers among all objects: half a second each, unfrozen.
    """
    global _frozen
    if len(sys.modules) != _frozen:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


_frozen = 0
