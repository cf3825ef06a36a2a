"""Two deliberate faults that leave the loss bit-equal, to show that parity sees them.

For `Case.around`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from torch import Tensor

_SUM = "hf_sp.model.norm.sum_over_ranks"


@contextlib.contextmanager
def partial_gradients_not_summed() -> Iterator[None]:
    """Norm weights keep the gradient of this rank's tokens or heads."""
    with mock.patch(_SUM, lambda dw, axis: dw):
        yield


@contextlib.contextmanager
def partial_gradients_averaged() -> Iterator[None]:
    """Their mean over the ranks instead of their sum."""
    from hf_sp.comm.collectives import all_reduce

    def averaged(dw: Tensor, axis: Any) -> Tensor:
        return all_reduce(dw, axis) / axis.size

    with mock.patch(_SUM, averaged):
        yield
