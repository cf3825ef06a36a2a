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
        self.held = False
        self.ports: dict[str, Tensor] = {}
        """Where gradients go while the decoder layer runs: ``PartialSums``."""

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
                if name in self.ports:
                    tensor = _SendToPort.apply(tensor, self.ports[name])
                else:
                    tensor = pairs.identity_allreduce(tensor, state.axis)
            module.__dict__[name] = tensor

    def hide(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give the registered parameters back."""
        for name in () if self.held else module._parameters:
            module.__dict__.pop(name, None)

    def hold(self, module: nn.Module, owner: nn.Module, args: Any) -> None:
        """Show them for as long as the module's owner runs."""
        self.show(module, args)
        self.held = True

    def release(self, module: nn.Module, owner: nn.Module, args: Any, output: Any) -> None:
        """Hide what is held."""
        self.held = False
        self.hide(module, args, output)


Partials = tuple[LocalParameters, str]
"""Who shows a parameter, and its name."""


class PartialSums:
    """Hooks of a decoder layer: one all-reduce of all partial gradients of ``owners``, its norms.

    A layer makes the node that the sums of the ``next`` one are delivered to: autograd runs what
    was recorded last first, and so waits for them when this layer's backward is done.
    """

    def __init__(
        self, state: ParallelState, owners: Sequence[tuple[nn.Module, LocalParameters]]
    ) -> None:
        self.state, self.owners = state, owners
        self.next: PartialSums | None = None

    def install(self, layer: nn.Module) -> None:
        """Register both hooks. The second also runs, to clean up, if the forward raises."""
        layer.register_forward_pre_hook(self.open)
        layer.register_forward_hook(self.close, prepend=True, always_call=True)

    def deliver(self, compiling: bool) -> tuple[list[Partials], tuple[Tensor, ...]]:
        """What has partial gradients, and the ports that their sums go to."""
        partials, weights = [], []
        for module, parameters in self.owners:
            for name, p in module._parameters.items():
                if p is not None and p.requires_grad and parameters.summed():
                    partials.append((parameters, name))
                    weights.append(local(p) if compiling else p)
        return partials, _Deliver.apply(*weights) if weights else ()

    def open(self, layer: nn.Module, args: Any) -> None:
        """Give each parameter a port."""
        if not torch.is_grad_enabled():
            return
        state, following, compiling = self.state, self.next, torch.compiler.is_compiling()
        layer_after, delivered = state.delivered
        partials, ports = delivered if layer_after is self else self.deliver(compiling)
        # Not where a checkpointed layer runs again, when the decoder's forward is over.
        if following is None or compiling or state.length is None:
            state.delivered = (None, None)
        else:
            state.delivered = (following, following.deliver(compiling))
        if ports:
            ports = _SumTogether.apply(state.axis, *ports)
            for (parameters, name), port in zip(partials, ports, strict=True):
                parameters.ports[name] = port

    def close(self, layer: nn.Module, args: Any, output: Any) -> None:
        """The layer has run."""
        for _, parameters in self.owners:
            parameters.ports = {}


class _Deliver(Node):
    """Weights -> ports of their shapes for sums, float32 (float64 for float64), no memory.

    Backward: waits for the sums that are in flight, and rounds them.
    """

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        values, ctx.specs = unpack(weights)
        ctx.dtypes = [w.dtype for w in values]
        wide = torch.float32
        return tuple(
            [
                w.new_empty_strided(
                    w.shape, (0,) * w.dim(), dtype=torch.promote_types(w.dtype, wide)
                )
                for w in values
            ]
        )

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
        return tuple([port.view_as(port) for port in ports])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        flat = [grad.flatten() for grad in grads if grad is not None]
        if not flat:
            return None, *grads
        total = comm.launch_all_reduce_(torch.cat(flat), ctx.axis)
        out: list[Tensor | None] = [None]
        start = 0
        for grad in grads:
            if grad is None:
                out.append(None)
                continue
            out.append(total[start : start + grad.numel()].view(grad.shape))
            start += grad.numel()
        return tuple(out)


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
