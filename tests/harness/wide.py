"""Models of transformers whose float32 inside of a float64 model is float64 too.

Scans, routers and norms of transformers cast to float32 whatever the dtype. With these casts left
out, the parallel model has to agree with the unsharded one as closely as in any float64 model: what
is more than that elsewhere is the casts' rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import parity
from harness.parity import Case, train_all
from harness.report import Report
from hf_sp.plan.source import _of_form, _of_function


@contextlib.contextmanager
def float32_is_float64() -> Iterator[None]:
    """A cast of a float64 tensor to float32 is none; sums and softmaxes likewise."""

    def wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if x.dtype == torch.float64:
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                if kwargs.get("dtype") is torch.float32:
                    kwargs["dtype"] = torch.float64
            return function(x, *args, **kwargs)

        return run

    as_float = Tensor.float
    with contextlib.ExitStack() as stack:
        for owner, name in ((Tensor, "to"), (Tensor, "type"), (F, "softmax"), (torch, "softmax")):
            stack.enter_context(mock.patch.object(owner, name, wide(getattr(owner, name))))
        keep = lambda x, **how: x if x.dtype == torch.float64 else as_float(x, **how)  # noqa: E731
        stack.enter_context(mock.patch.object(Tensor, "float", keep))
        yield


def train_wide(cases: Iterable[Case]) -> list[Report]:
    """`train_all`, in float64 throughout."""
    # What is kept is of other functions: runs of unsharded models, and texts of forwards, with the
    # functions that they name.
    kept = parity._reference_run, _of_form, _of_function
    for one in kept:
        one.cache_clear()
    try:
        with float32_is_float64():
            return train_all(cases)
    finally:
        for one in kept:
            one.cache_clear()
