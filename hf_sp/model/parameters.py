"""Replicated parameters: shown as local tensors while their module runs; their gradients summed.

HF's norms read ``self.weight`` and mix it with plain activations. During the module's forward an
entry of that name in the instance's ``__dict__`` shadows the registered parameter (attribute lookup
asks ``__dict__`` first; ``state_dict`` and ``named_parameters`` read ``_parameters`` and see no
change). So any form of norm works, unmodified, and no class is replaced.

Where a rank uses such a parameter on its tokens or its heads only, the gradient is a part of the
sum over the ranks. ``PartialSums`` sums those of a decoder layer together.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator, Sequence
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

    The sum is a part of the graph, so that it happens once per micro-batch, before accumulation.

    Args:
        state: the model's.
        partial: when there is something to sum.
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

    @contextlib.contextmanager
    def shown(self, module: nn.Module) -> Iterator[None]:
        """Shadow the parameters inside, for a forward that is called without its hooks."""
        self.show(module, ())
        try:
            yield
        finally:
            self.hide(module, (), None)

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

    A layer makes the node that delivers the sums of the next one. Autograd runs what was recorded
    last first: that node, which waits for the all-reduce, after this layer's backward.

    Args:
        state: the model's.
        norms: modules with one parameter, ``weight``, and when its gradient is partial.
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
        # FSDP reduces a layer's gradients when its backward ends, so they have to be there; so has
        # a checkpointed layer, which runs when the decoder's forward is over.
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
    """Weights ``[H_i]`` -> ports of the same shapes in float32 (float64 for float64), no memory.

    Backward: waits for the sums that are in flight, and rounds them.
    """

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.specs, ctx.dtypes = unpack(weights)[1], [w.dtype for w in weights]
        return tuple(_port(w, torch.promote_types(w.dtype, torch.float32)) for w in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *sums: Tensor | None) -> Any:
        # They share their memory, and so the wait.
        here = [comm.wait(x) for x in sums if x is not None][:1]
        several = sum(x is not None for x in sums) > 1
        out = [
            None if x is None else x.to(dtype, copy=several)
            for x, dtype in zip(sums, ctx.dtypes, strict=True)
        ]
        return tuple(pack(out, ctx.specs))


class _SumTogether(Node):
    """Ports for partial gradients ``[H_i]``: summed over the ranks, the sums in flight.

    Forward:  no collective
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
        total = sum_over_ranks(torch.cat([grad.reshape(-1) for grad in used]), ctx.axis)
        parts = iter(total.split([grad.numel() for grad in used]))
        return None, *(None if g is None else next(parts).view(g.shape) for g in grads)


def _port(like: Tensor, dtype: torch.dtype) -> Tensor:
    shape = tuple(like.shape)
    return torch.empty_strided(shape, (0,) * len(shape), dtype=dtype, device=like.device)


def sum_over_ranks(dw: Tensor, axis: Axis) -> Tensor:
    """Launch the sum of partial gradients, in their memory. One all-reduce, to be waited for."""
    return comm.launch_all_reduce_(dw, axis)


class _SendToPort(Node):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, port: Tensor) -> Tensor:
        ctx.dtype = port.dtype
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0].to(ctx.dtype)
