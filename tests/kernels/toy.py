"""Kernels small enough to show what the interpreter does."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(X, Y, BACK, n, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    y = tl.load(X + col, mask=col < n).to(tl.bfloat16)
    tl.store(Y + col, y, mask=col < n)
    tl.store(BACK + col, y.to(tl.float32), mask=col < n)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def column_sum_kernel(X, Y, rows, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(0, rows, num_stages=2):
        total = _plus(total, tl.load(X + row * BLOCK + col))
    tl.store(Y + col, total + 0 * tl.sum(total, axis=0))
