"""Matrix products over experts: rows sorted by expert, one weight for each stretch of rows.

Shape letters: R rows, E experts, i and o features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.torch_private import is_fake


@dataclass(slots=True)
class Groups:
    """Where each expert's rows end.

    Args:
        ends: ``[E]`` int32 on the device.
        host: the same as a list, read when someone needs it: a synchronisation.
    """

    ends: Tensor
    host: list[int] | None = None

    def on_host(self) -> list[int]:
        """``ends`` as a list."""
        if self.host is None:
            self.host = self.ends.tolist()
        return self.host

    def stretches(self) -> Iterator[tuple[int, slice]]:
        """Each expert that has rows, and these; none where there are no numbers to tell."""
        if self.host is None and is_fake(self.ends):
            return
        ends = self.on_host()
        for expert, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > first:
                yield expert, slice(first, end)


def _suits(x: Tensor) -> bool:
    """Whether the grouped kernel is for x at all: its device and dtype."""
    return x.is_cuda and x.dtype == torch.bfloat16


def _fused(*operands: Tensor) -> Any:
    """The grouped GEMM of torch, where it takes these: bfloat16 on CUDA, strides of 16 bytes."""
    kernel = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if all(is_fake(x) and x.dtype == torch.bfloat16 for x in operands):
        return kernel  # no rows to loop over: the estimator's tensors have no values
    for x in operands:
        # Nothing to multiply: kernels differ in what they make of no rows.
        if not _suits(x) or not x.numel():
            return None
        bytes_apart = [n * x.element_size() for n in x.stride() if n != 1]
        if x.data_ptr() % 16 or any(n % 16 for n in bytes_apart):
            return None
    return kernel


def _padded(x: Tensor, dim: int) -> Tensor:
    """Zeros up to a multiple of 8 along ``dim``, so that rows are 16 bytes apart in bfloat16."""
    missing = -x.shape[dim] % 8 if _suits(x) else 0
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x


def grouped_linear(x_Ri: Tensor, weight_Eoi: Tensor, groups: Groups) -> Tensor:
    """``x W_e^T`` for the rows of each expert -> ``[R, o]``."""
    return grouped_input_gradient(x_Ri, weight_Eoi.transpose(1, 2), groups)


def grouped_input_gradient(dy_Ro: Tensor, weight_Eoi: Tensor, groups: Groups) -> Tensor:
    """``dy W_e`` for the rows of each expert -> ``[R, i]``."""
    inside = weight_Eoi.shape[2]
    dy, weight = _padded(dy_Ro, 1), _padded(_padded(weight_Eoi, 2), 1)
    kernel = _fused(dy, weight)
    if kernel is not None:
        return kernel(dy, weight, offs=groups.ends)[:, :inside]
    dx = dy_Ro.new_empty(dy_Ro.shape[0], inside)
    for expert, rows in groups.stretches():
        torch.mm(dy_Ro[rows], weight_Eoi[expert], out=dx[rows])
    return dx


def grouped_weight_gradient(dy_Ro: Tensor, x_Ri: Tensor, groups: Groups) -> Tensor:
    """``dy_e^T x_e`` -> ``[E, o, i]``; zeros for an expert without rows."""
    outside, inside = dy_Ro.shape[1], x_Ri.shape[1]
    dy, x = _padded(dy_Ro, 1), _padded(x_Ri, 1)
    kernel = _fused(dy, x)
    if kernel is not None:
        dw = kernel(dy.t(), x, offs=groups.ends)
        return dw[:, :outside, :inside].contiguous()
    dw = dy_Ro.new_zeros(groups.ends.shape[0], outside, inside)
    for expert, rows in groups.stretches():
        torch.mm(dy_Ro[rows].t(), x_Ri[rows], out=dw[expert])
    return dw
