"""Replicated parameters: shown as local tensors while their module runs; their gradients summed.

HF's norms mix ``self.weight`` with plain activations. During the module's forward an entry of that
name in the instance's ``__dict__`` shadows the registered parameter (attribute lookup asks
``__dict__`` first; ``state_dict`` and ``named_parameters`` read ``_parameters``): any form of norm
works, unmodified.

Where a rank uses such a parameter on its tokens or its heads only, the gradient is a part of the
sum over the ranks. ``PartialSums`` sums those of a decoder layer together.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.model.local import local
from hf_sp.state import ParallelState
from hf_sp.torch_private import pack, unpack

PARTIAL = "_hf_sp_partial"


class Partial(enum.Enum):
    """When the gradient of a replicated parameter is a part of the sum over the ranks."""

    HEADS = "always: each rank has its own heads, or features"
    TOKENS = "with sp: each rank has its own tokens"
    DECODER_TOKENS = "with sp, inside of a forward of the decoder"
    NEVER = "each rank computes the same"


class LocalParameters:
    """Hooks that show a module its parameters as local tensors, and sum their gradients over tp.

    The sum is a part of the graph: once per micro-batch, before accumulation.
    """

    def __init__(self, state: ParallelState, partial: Partial) -> None:
        self.state, self.partial = state, partial
        self.port: Tensor | None = None
        """Where the one weight's gradient goes while its decoder layer runs: ``PartialSums``."""

    def install(self, module: nn.Module) -> None:
        """Register the hooks. The second runs even if the forward raises."""
        setattr(module, PARTIAL, self.partial is Partial.HEADS)
        module.register_forward_pre_hook(self.show, prepend=True)
        module.register_forward_hook(self.hide, prepend=True, always_call=True)

    def summed(self) -> bool:
        """Whether gradients of the current forward are partial."""
        state, partial = self.state, self.partial
        if partial is Partial.TOKENS:
            return state.sp
        if partial is Partial.DECODER_TOKENS:
            return state.sharded and state.length is not None
        return partial is Partial.HEADS

    def show(self, module: nn.Module, args: Any) -> None:
        """Shadow the parameters with their local tensors."""
        state, summed = self.state, self.summed()
        for name, p in module._parameters.items():
            if p is None:
                continue
            tensor = local(p)
            if summed and p.requires_grad and torch.is_grad_enabled():
                if self.port is not None:
                    tensor = _SendToPort.apply(tensor, self.port)
                else:
                    tensor = pairs.identity_allreduce(tensor, state.axis)
            module.__dict__[name] = tensor

    def hide(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give the registered parameters back."""
        for name in module._parameters:
            module.__dict__.pop(name, None)


class PartialSums:
    """Hooks of a decoder layer: one all-reduce of all partial gradients of its norms.

    ``norms`` have one parameter, ``weight``.
    """

    def __init__(
        self, state: ParallelState, norms: Sequence[tuple[nn.Module, LocalParameters]]
    ) -> None:
        self.state, self.norms = state, norms

    def install(self, layer: nn.Module) -> None:
        """Register both hooks. The second also runs, to clean up, if the forward raises."""
        layer.register_forward_pre_hook(self.open)
        layer.register_forward_hook(self.close, prepend=True, always_call=True)

    def open(self, layer: nn.Module, args: Any) -> None:
        """Give each norm a port."""
        if not torch.is_grad_enabled():
            return
        chosen = []
        for norm, parameters in self.norms:
            weight = norm._parameters["weight"]
            if weight is not None and weight.requires_grad and parameters.summed():
                chosen.append((parameters, weight))
        if not chosen:
            return
        compiling = torch.compiler.is_compiling()
        weights = [local(weight) if compiling else weight for _, weight in chosen]
        ports = sum_together(self.state.axis, *weights)
        for (parameters, _), port in zip(chosen, ports, strict=True):
            parameters.port = port

    def close(self, layer: nn.Module, args: Any, output: Any) -> None:
        """The layer has run."""
        for _, parameters in self.norms:
            parameters.port = None


class _SumTogether(Node):
    """Ports for partial gradients ``[H_i]`` in float32: summed over the ranks, then rounded.

    Shapes:   weights [H_i] -> ports [H_i], float32 (float64 for float64), without memory
    Backward: 1 all-reduce of all gradients together
    Saves:    nothing
    """

    @staticmethod
    def forward(ctx: Any, axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        ctx.set_materialize_grads(False)
        values, ctx.specs = unpack(weights)
        ctx.dtypes = [w.dtype for w in values]
        ports = []
        for w in values:
            dtype = torch.promote_types(w.dtype, torch.float32)
            ports.append(w.new_empty_strided(w.shape, (0,) * w.dim(), dtype=dtype))
        return tuple(ports)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        used = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        out: list[Tensor | None] = [None] * len(grads)
        if used:
            total = comm.all_reduce_(torch.cat([grad.flatten() for _, grad in used]), ctx.axis)
            parts = total.split([grad.numel() for _, grad in used])
            for (i, grad), part in zip(used, parts, strict=True):
                out[i] = part.view(grad.shape).to(ctx.dtypes[i], copy=len(used) > 1)
        return None, *pack(out, ctx.specs)


sum_together = _SumTogether.apply


class _SendToPort(Node):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, port: Tensor) -> Tensor:
        ctx.dtype = port.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0].to(ctx.dtype)
