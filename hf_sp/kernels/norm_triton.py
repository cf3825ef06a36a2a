"""Triton kernels of RMSNorm, with their launchers.

The arithmetic is :mod:`hf_sp.kernels.reference`'s, and the bits of the forward with it. Must not
know autograd. Imported at the first launch only.
"""

from __future__ import annotations

from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

import hf_sp.kernels.launch as dispatch
import hf_sp.kernels.table as table
from hf_sp.kernels.layout import readable, rows_of
from hf_sp.kernels.reference import Casting
from hf_sp.kernels.table import LaunchConfig

# Written with care for the interpreter: everything is float32 before arithmetic (its bfloat16 is
# wrong), row numbers are made from tl.arange (loop variables are plain ints there), and numbers
# such as eps are constexpr (float arguments are plain floats there).


@triton.jit
def rms_norm_forward_kernel(
    X,
    W,
    Y,
    RSTD,
    rows,
    inner,
    x_outer,
    x_inner,
    y_outer,
    y_inner,
    q_outer,
    q_inner,
    N: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    HAS_W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of rows: its statistics, y."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)[None, :]
    live = (row < rows)[:, None] & (col < N)
    # int64: rows * N may pass 2^31.
    outer = (row // inner).to(tl.int64)[:, None]
    within = (row % inner).to(tl.int64)[:, None]

    x = tl.load(X + outer * x_outer + within * x_inner + col, mask=live, other=0.0)
    x32 = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x32 * x32, axis=1, keep_dims=True) / N + EPS)
    tl.store(RSTD + outer * q_outer + within * q_inner, rstd, mask=(row < rows)[:, None])
    y = x32 * rstd
    if LLAMA:
        y = y.to(x.dtype).to(tl.float32)
    if HAS_W:
        w = tl.load(W + col, mask=col < N, other=0.0).to(tl.float32)
        if OFFSET != 0.0:
            w = w + OFFSET
        y = y * w
    tl.store(Y + outer * y_outer + within * y_inner + col, y.to(Y.dtype.element_ty), mask=live)


@triton.jit
def rms_norm_backward_kernel(
    DY,
    X,
    W,
    RSTD,
    DX,
    DW,
    rows,
    inner,
    g_outer,
    g_inner,
    x_outer,
    x_inner,
    q_outer,
    q_inner,
    d_outer,
    d_inner,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    LLAMA: tl.constexpr,
    HAS_W: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every so many-th tile of rows: dx, and this program's part of dw."""
    pid = tl.program_id(0)
    col = tl.arange(0, BLOCK_N)[None, :]
    if HAS_W:
        w = tl.load(W + col, mask=col < N, other=0.0).to(tl.float32)
        if OFFSET != 0.0:
            w = w + OFFSET
    if NEED_DW:
        dw = tl.full([ROWS, BLOCK_N], 0.0, tl.float32)
    # Block b always goes to program b % programs, and in this order: the same sum every time.
    for block in tl.range(pid, (rows + ROWS - 1) // ROWS, tl.num_programs(0), num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        live = inside & (col < N)
        outer = (row // inner).to(tl.int64)[:, None]
        within = (row % inner).to(tl.int64)[:, None]
        dy = tl.load(DY + outer * g_outer + within * g_inner + col, mask=live, other=0.0)
        x = tl.load(X + outer * x_outer + within * x_inner + col, mask=live, other=0.0)
        # 0 in rows past the end, whatever eps is: they add nothing to dw.
        rstd = tl.load(RSTD + outer * q_outer + within * q_inner, mask=inside, other=0.0)
        dy32 = dy.to(tl.float32)
        xhat = x.to(tl.float32) * rstd
        if NEED_DW:
            if LLAMA:
                dw += dy32 * xhat.to(x.dtype).to(tl.float32)
            else:
                dw += dy32 * xhat
        if NEED_DX:
            g = dy32
            if HAS_W:
                g = dy32 * w
            dx = rstd * (g - xhat * (tl.sum(g * xhat, axis=1, keep_dims=True) / N))
            dx = dx.to(DX.dtype.element_ty)
            tl.store(DX + outer * d_outer + within * d_inner + col, dx, mask=live)
    if NEED_DW:
        total = tl.sum(dw, axis=0, keep_dims=True)
        tl.store(DW + pid.to(tl.int64) * N + col, total, mask=col < N)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    casting: Casting,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward, ``(y, rstd [...])``; ``config`` instead of the table's."""
    n = x.shape[-1]
    config = config or table.norm_forward(n)
    (x,) = readable(x)
    # Only the llama form promotes with the weight.
    wide = x if weight is None or casting != "llama" else weight
    dtype = torch.promote_types(x.dtype, wide.dtype)
    y = torch.empty_like(x, dtype=dtype)
    rstd = torch.empty_like(x[..., 0], dtype=torch.float32)
    walk = rows_of([x, y, rstd], x)
    assert walk is not None
    dispatch.launch(
        rms_norm_forward_kernel,
        ((walk.count + config.rows - 1) // config.rows,),
        x,
        x if weight is None else weight.contiguous(),
        y,
        rstd,
        walk.count,
        walk.inner,
        *chain.from_iterable(walk.strides),
        N=n,
        EPS=float(eps),
        OFFSET=float(offset),
        LLAMA=casting == "llama",
        HAS_W=weight is not None,
        ROWS=config.rows,
        BLOCK_N=table.next_power_of_2(n),
        num_warps=config.warps,
    )
    return y, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    offset: float,
    casting: Casting,
    need_dx: bool = True,
    need_dw: bool = True,
    *,
    config: LaunchConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Launch the backward: ``(dx, dw [N] in float32)``, None for what is not needed."""
    n = x.shape[-1]
    config = config or table.norm_backward(n)
    x, dy = readable(x, dy)
    dx = torch.empty_like(x) if need_dx else None
    walk = rows_of([dy, x, rstd, dx], x)
    if walk is None:
        rstd = torch.empty_like(x[..., 0], dtype=torch.float32).copy_(rstd)
        walk = rows_of([dy, x, rstd, dx], x)
    assert walk is not None
    tiles = (walk.count + config.rows - 1) // config.rows
    grid = min(tiles, dispatch.programs(x.device, config.per_sm))
    partial = torch.empty(grid, n, dtype=torch.float32, device=x.device) if need_dw else None
    dispatch.launch(
        rms_norm_backward_kernel,
        (grid,),
        dy,
        x,
        x if weight is None else weight.contiguous(),
        rstd,
        x if dx is None else dx,
        rstd if partial is None else partial,
        walk.count,
        walk.inner,
        *chain.from_iterable(walk.strides),
        N=n,
        OFFSET=float(offset),
        LLAMA=casting == "llama",
        HAS_W=weight is not None,
        NEED_DX=need_dx,
        NEED_DW=need_dw,
        ROWS=config.rows,
        BLOCK_N=table.next_power_of_2(n),
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return dx, None if partial is None else partial.sum(0)
