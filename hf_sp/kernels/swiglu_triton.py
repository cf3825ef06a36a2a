"""Triton kernels of gated products (SwiGLU, GeGLU), with their launchers.

The arithmetic is :mod:`hf_sp.kernels.reference`'s, and the bits of the product with it. Must not
know autograd. Imported at the first launch only.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import hf_sp.kernels.launch as dispatch
import hf_sp.kernels.table as table
from hf_sp.kernels.layout import readable, rows_of
from hf_sp.kernels.reference import GELU_TANH, SILU, Gating
from hf_sp.kernels.table import LaunchConfig


@triton.jit
def swiglu_forward_kernel(
    G,
    U,
    Z,
    n,
    tiles,
    inner,
    g_outer,
    g_inner,
    u_outer,
    u_inner,
    z_outer,
    z_inner,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of the product."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    outer = row // inner
    within = row % inner
    # int64: without strides in the way the whole tensor is one row.
    col = (pid % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = col < n
    g = tl.load(G + outer * g_outer + within * g_inner + col, mask=live, other=0.0)
    u = tl.load(U + outer * u_outer + within * u_inner + col, mask=live, other=0.0)
    g32 = g.to(tl.float32)
    v = g32
    if GELU:
        # 2 sqrt(2 / pi) (g + 0.044715 g^3): GELU's tanh form is g sigmoid of that.
        v = 1.5957691216057308 * (g32 + 0.044715 * g32 * g32 * g32)
    act = (g32 / (1.0 + tl.exp(-v))).to(g.dtype).to(tl.float32)
    z = (act * u.to(tl.float32)).to(g.dtype)
    tl.store(Z + outer * z_outer + within * z_inner + col, z, mask=live)


@triton.jit
def swiglu_backward_kernel(
    DZ,
    G,
    U,
    DG,
    DU,
    Z,
    n,
    tiles,
    inner,
    d_outer,
    d_inner,
    g_outer,
    g_inner,
    u_outer,
    u_inner,
    dg_outer,
    dg_inner,
    du_outer,
    du_inner,
    z_outer,
    z_inner,
    GELU: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of both gradients, and of the product where it is asked for."""
    pid = tl.program_id(0)
    row = (pid // tiles).to(tl.int64)
    outer = row // inner
    within = row % inner
    col = (pid % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = col < n
    dz = tl.load(DZ + outer * d_outer + within * d_inner + col, mask=live, other=0.0)
    g = tl.load(G + outer * g_outer + within * g_inner + col, mask=live, other=0.0)
    u = tl.load(U + outer * u_outer + within * u_inner + col, mask=live, other=0.0)
    dz32 = dz.to(tl.float32)
    g32 = g.to(tl.float32)
    u32 = u.to(tl.float32)
    v = g32
    if GELU:
        v = 1.5957691216057308 * (g32 + 0.044715 * g32 * g32 * g32)
    e = 1.0 + tl.exp(-v)
    sigmoid = 1.0 / e
    act = g32 / e
    slope = act * (1.0 - sigmoid)
    if GELU:
        slope = slope * (1.5957691216057308 * (1.0 + 0.134145 * g32 * g32))
    dg = dz32 * u32 * (sigmoid + slope)
    tl.store(DG + outer * dg_outer + within * dg_inner + col, dg.to(g.dtype), mask=live)
    tl.store(DU + outer * du_outer + within * du_inner + col, (dz32 * act).to(g.dtype), mask=live)
    if PRODUCT:
        z = (act.to(g.dtype).to(tl.float32) * u32).to(g.dtype)
        tl.store(Z + outer * z_outer + within * z_inner + col, z, mask=live)


def swiglu(
    gate: Tensor, up: Tensor, gating: Gating = SILU, *, config: LaunchConfig | None = None
) -> Tensor:
    """Launch the forward; ``config`` instead of the table's."""
    gate, up = readable(gate, up)
    z = torch.empty_like(gate)
    _launch(swiglu_forward_kernel, gate, [gate, up, z], config, GELU=gating == GELU_TANH)
    return z


def swiglu_backward(
    dz: Tensor,
    gate: Tensor,
    up: Tensor,
    gating: Gating = SILU,
    *,
    product: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch the backward: ``(dgate, dup, z or None)``, laid out as gate."""
    gate, up, dz = readable(gate, up, dz)
    dgate, dup = torch.empty_like(gate), torch.empty_like(gate)
    z = torch.empty_like(gate) if product else None
    tensors = [dz, gate, up, dgate, dup, dgate if z is None else z]
    options = {"GELU": gating == GELU_TANH, "PRODUCT": product}
    _launch(swiglu_backward_kernel, gate, tensors, config, **options)
    return dgate, dup, z


def _launch(
    kernel: Any, lead: Tensor, tensors: list[Tensor], config: LaunchConfig | None, **options: Any
) -> None:
    config = config or table.SWIGLU
    walk = rows_of(tensors, lead)
    assert walk is not None
    rows, n = walk.count, lead.shape[-1]
    if walk.inner == 1 and all(outer == n for outer, _ in walk.strides):
        rows, n = 1, rows * n  # no gaps between the rows: one row, and no ragged tile at each end
    tiles = (n + config.block - 1) // config.block
    dispatch.launch(
        kernel,
        (rows * tiles,),
        *tensors,
        n,
        tiles,
        walk.inner,
        *chain.from_iterable(walk.strides),
        BLOCK=config.block,
        num_warps=config.warps,
        **options,
    )
