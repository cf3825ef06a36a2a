"""Two deliberate faults that leave the loss bit-equal, to show that parity sees them.

For `Case.around`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from torch import Tensor


@contextlib.contextmanager
def partial_gradients_not_summed() -> Iterator[None]:
    """Norm weights keep the gradient of this rank's tokens or heads."""

    def identity(x: Tensor, axis: object) -> Tensor:
        return x

    with mock.patch("hf_sp.collectives.identity_allreduce", identity):
        yield


@contextlib.contextmanager
def partial_gradients_averaged() -> Iterator[None]:
    """Their mean over the ranks instead of their sum."""
    from hf_sp import collectives

    summed = collectives.identity_allreduce

    def averaged(x: Tensor, axis: collectives.Axis) -> Tensor:
        y = summed(x, axis)
        # Value of y, gradient of y / size.
        return y.detach() + (y - y.detach()) / axis.size

    with mock.patch("hf_sp.collectives.identity_allreduce", averaged):
        yield
