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

    ``norms`` have one parameter, ``weight``. A layer makes the node that the sums of the ``next``
    one are delivered to: autograd runs what was recorded last first, and so waits for them when
    this layer's backward is done.
    """

    def __init__(
        self, state: ParallelState, norms: Sequence[tuple[nn.Module, LocalParameters]]
    ) -> None:
        self.state, self.norms = state, norms
        self.next: PartialSums | None = None

    def install(self, layer: nn.Module) -> None:
        """Register both hooks. The second also runs, to clean up, if the forward raises."""
        layer.register_forward_pre_hook(self.open)
        layer.register_forward_hook(self.close, prepend=True, always_call=True)

    def deliver(self) -> tuple[list[LocalParameters], tuple[Tensor, ...]]:
        """The norms whose gradients are partial, and the ports that their sums go to."""
        norms, weights = [], []
        compiling = torch.compiler.is_compiling()
        for norm, parameters in self.norms:
            weight = norm._parameters["weight"]
            if weight is not None and weight.requires_grad and parameters.summed():
                norms.append(parameters)
                weights.append(local(weight) if compiling else weight)
        return norms, _Deliver.apply(*weights) if weights else ()

    def open(self, layer: nn.Module, args: Any) -> None:
        """Give each norm a port."""
        if not torch.is_grad_enabled():
            return
        state = self.state
        layer_after, delivered = state.delivered
        norms, ports = delivered if layer_after is self else self.deliver()
        # Not where FSDP reduces a layer's gradients at the end of its backward, nor where a
        # checkpointed layer runs again, when the decoder's forward is over.
        late = state.data == 1 and state.length is not None and not torch.compiler.is_compiling()
        following = self.next if late else None
        state.delivered = (following, following.deliver()) if following else (None, None)
        if ports:
            ports = _SumTogether.apply(state.axis, *ports)
            for parameters, port in zip(norms, ports, strict=True):
                parameters.port = port

    def close(self, layer: nn.Module, args: Any, output: Any) -> None:
        """The layer has run."""
        for _, parameters in self.norms:
            parameters.port = None


class _Deliver(Node):
    """Weights ``[H_i]`` -> ports ``[H_i]`` for sums, float32 (float64 for float64), no memory.

    Backward: waits for the sums that are in flight, and rounds them.
    """

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        values, ctx.specs = unpack(weights)
        ctx.dtypes = [w.dtype for w in values]
        return tuple(_port(w, torch.promote_types(w.dtype, torch.float32)) for w in values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *sums: Tensor | None) -> Any:
        used = [(i, x) for i, x in enumerate(sums) if x is not None]
        out: list[Tensor | None] = [None] * len(sums)
        for n, (i, x) in enumerate(used):
            # They share their memory, and so the wait.
            whole = x if n else comm.wait(x)
            out[i] = whole.to(ctx.dtypes[i], copy=len(used) > 1)
        return tuple(pack(out, ctx.specs))


class _SumTogether(Node):
    """Ports for partial gradients ``[H_i]``, whose sums over the ranks are sent on in flight.

    Backward: 1 all-reduce of all gradients together
    Saves:    nothing
    """

    @staticmethod
    def forward(ctx: Any, axis: Axis, *ports: Tensor) -> tuple[Tensor, ...]:
        ctx.axis = axis
        ctx.set_materialize_grads(False)
        return tuple(_port(port, port.dtype) for port in ports)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        used = [grad for grad in grads if grad is not None]
        if not used:
            return None, *grads
        total = comm.launch_all_reduce_(torch.cat([grad.flatten() for grad in used]), ctx.axis)
        parts = iter(total.split([grad.numel() for grad in used]))
        return None, *(None if g is None else next(parts).view(g.shape) for g in grads)


def _port(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty_strided(like.shape, (0,) * like.dim(), dtype=dtype)


def sum_together(axis: Axis, *weights: Tensor) -> tuple[Tensor, ...]:
    """Ports for partial gradients of weights: one all-reduce, waited for at once."""
    return _SumTogether.apply(axis, *_Deliver.apply(*weights))


class _SendToPort(Node):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, port: Tensor) -> Tensor:
        ctx.dtype = port.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0].to(ctx.dtype)
