"""A Gated DeltaNet's scan as a kernel would keep it, where none is installed.

transformers' own in torch operations keeps states of each chunk of 64 tokens, which kernels make
again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5


class _Scan(torch.autograd.Function):
    """Shapes and memory of a scan: it keeps what it is given. The numbers are nobody's."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, g, beta)
        return torch.zeros_like(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.zeros_like(x) for x in ctx.saved_tensors)


@contextlib.contextmanager
def kernel_scan() -> Iterator[None]:
    """Qwen3.5's layers have such a scan inside of it."""

    def scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **_: Any) -> Any:
        return _Scan.apply(q, k, v, g, beta), None

    with mock.patch.object(modeling_qwen3_5, "torch_chunk_gated_delta_rule", scan):
        yield
