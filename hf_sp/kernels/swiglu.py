"""Gated products, ``act(gate) * up``, that keep gate and up for backward and nothing else.

Must not know how the kernels work, linear layers, or ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hf_sp.kernels.launch as dispatch
import hf_sp.kernels.reference as reference
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.errors import ShapeError
from hf_sp.kernels.blocks import by_blocks
from hf_sp.kernels.reference import SILU, Gating


def swiglu(gate: Tensor, up: Tensor, *, gating: Gating = SILU, triton: bool = True) -> Tensor:
    """``act(gate) * up``, SiLU's if not said otherwise, with Hugging Face's roundings.

    Shapes:    gate, up ``[..., f]``, of any strides (halves of one fused buffer and sequence-major
               memory are read where they lie) -> ``[..., f]`` with gate's memory layout
    dtype:     any floating ones -> the promoted one. act is rounded before the product, as in
               ``act_fn(gate) * up``: the same bits but for last-bit differences of ``exp``.
               Gradients are computed in float32 and rounded once, which autograd does twice
    Saves:     gate and up; autograd would save act(gate) too, a third more memory in every MLP
    No collective. Not differentiable twice. Under torch.compile this is the plain expression;
    ``triton=False`` keeps to torch operations.

    Raises:
        ShapeError: shapes or devices differ, or a dtype is not floating.
    """
    _check(gate, up)
    if torch.compiler.is_compiling():
        return reference.swiglu(gate, up, gating)
    return SwiGlu.apply(gate, up, gating, triton)


def swiglu_forward(
    gate: Tensor, up: Tensor, *, gating: Gating = SILU, triton: bool = True
) -> Tensor:
    """The forward pass, unchecked, for where autograd does not record: the bits of ``swiglu``."""
    kernels = dispatch.swiglu_kernels(gating[0], gate, up) if triton else None
    return (kernels or reference).swiglu(gate, up, gating)


def swiglu_backward(
    dz: Tensor,
    gate: Tensor,
    up: Tensor,
    *,
    gating: Gating = SILU,
    product: bool = False,
    triton: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The backward pass, unchecked, for where autograd does not record.

    ``dz [..., f]`` is left as it is. ``product``: also make ``z``, bit-equal to the forward's, so
    that it need not be saved.

    Returns:
        ``(dgate, dup, z or None)``, each in the layout and dtype of gate, up and gate.
    """
    kernels = dispatch.swiglu_kernels(gating[0], gate, up, dz) if triton else None
    if kernels is not None:
        return kernels.swiglu_backward(dz, gate, up, gating, product=product)

    def block(gate: Tensor, up: Tensor, dz: Tensor) -> tuple:
        return reference.swiglu_backward(dz, gate, up, product, gating)

    dgate, dup, z = by_blocks(block, gate, up, dz)
    return dgate, dup, z


class SwiGlu(Node):
    """Autograd's view of :func:`swiglu`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gating: Gating, triton: bool) -> Tensor:
        """Compute the product."""
        ctx.how = {"gating": gating, "triton": triton}
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up, **ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        dgate, dup, _ = swiglu_backward(grads[0], gate, up, **ctx.how)
        need_gate, need_up = ctx.needs_input_grad[:2]
        return dgate if need_gate else None, dup if need_up else None, None, None


def _check(gate: Tensor, up: Tensor) -> None:
    where = "hf_sp.kernels.swiglu(gate, up)"
    if gate.shape != up.shape or gate.device != up.device:
        raise ShapeError(
            "swiglu needs a gate and an up projection of one shape on one device.",
            where=where,
            got=f"gate {list(gate.shape)} on {gate.device}, up {list(up.shape)} on {up.device}",
            rule="the product is elementwise, and never broadcasts",
            legal="two tensors [..., f] alike",
        )
    if not (gate.is_floating_point() and up.is_floating_point()):
        raise ShapeError(
            "swiglu works on floating point numbers.",
            where=where,
            got=f"gate {gate.dtype}, up {up.dtype}",
            legal="float32, bfloat16, float16, float64",
        )
