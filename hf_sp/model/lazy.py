"""Tensors that are made only when touched: the logits, and the gathered hidden states before them.

HF's forward calls the LM head before it knows of labels, and hands the result to
``loss_function``, which needs no logits where it can run the chunked linear form; nor does that
form need the hidden states of all ranks at once. So where only the loss is wanted, the final norm
and the parallel head return stand-ins of the right shape and dtype. The first operation on one
makes the whole tensor, with its gradient path; none is silently wrong. Two kinds of operation are
let through: a slice that keeps everything (``logits_to_keep=0``), and a number's product or a tanh
on the logits, which the loss can apply by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hf_sp.comm.autograd import once_differentiable
from hf_sp.errors import ConfigError
from hf_sp.torch_private import stand_in, without_torch_function

# What may be asked of a stand-in without making the tensor.
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "is_cuda")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    Tensor.size,
    Tensor.dim,
    Tensor.ndimension,
    Tensor.numel,
    Tensor.is_floating_point,
    Tensor.is_complex,
    Tensor.element_size,
    Tensor.__len__,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}
_PRODUCTS = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul}
_QUOTIENTS = {Tensor.div, Tensor.__truediv__, torch.div}
_TANHS = {Tensor.tanh, torch.tanh}


class _Carry(torch.autograd.Function):
    """Gives a stand-in a gradient path of its own.

    An operation makes the whole tensor and goes on with that. A foreign autograd Function does not
    ask: the stand-in itself is its input, is made inside its forward, and is sent its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        build: Callable[[], Tensor],
        back: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.back = back
        return build()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.back(grads[0]), None, None


def _refuse_gradient(grad: Tensor) -> Tensor:
    raise ConfigError(
        "logits that had not been made were given to an autograd Function",
        rule="hf_sp cannot tell how its gradient reaches the head",
        remedy="parallelize(..., keep_logits=True)",
    )


class LazyTensor(Tensor):
    """Stand-in for a tensor; any operation on it makes it (a collective, on all ranks alike)."""

    _make: Callable[[], Tensor] | None
    _made: Tensor | None
    _modes: tuple[bool, bool]

    @classmethod
    def _stand_in(
        cls,
        shape: tuple[int, ...],
        like: Tensor,
        make: Callable[[], Tensor],
        source: Tensor,
        back: Callable[[Tensor], Tensor],
    ) -> Self:
        """A tensor without storage, of the dtype and on the device of ``like``.

        Args:
            shape: its shape.
            like: a tensor of its dtype and device.
            make: makes the whole tensor.
            source: what the tensor's gradient ends in.
            back: from the stand-in's own gradient to the source's.
        """
        if torch.is_grad_enabled() and source.requires_grad:
            self = _Carry.apply(source, functools.partial(stand_in, cls, shape, like), back)
        else:
            self = cast(Self, stand_in(cls, shape, like))
        self._make, self._made = make, None
        self._modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return self

    @property
    def made(self) -> bool:
        """Whether somebody has touched it."""
        return self._made is not None

    def materialize(self) -> Tensor:
        """The whole tensor; made on the first call, on all ranks together."""
        if self._made is None:
            assert self._make is not None
            grad, inference = self._modes
            # As where the tensor would have been made: the first to touch it may do so under
            # no_grad, and the gradient path is for those who come after.
            with torch.inference_mode(inference), torch.set_grad_enabled(grad):  # noqa: SIM117
                with without_torch_function():
                    self._made = self._make()
            # What it was made from is not kept for it any longer.
            self._make = None
        return self._made

    def deferred(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """The result of an operation on this stand-in that can wait; None if it cannot."""
        return None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with without_torch_function():
                return func(*args, **kwargs)
        if args and isinstance(args[0], LazyTensor) and not args[0].made:
            result = args[0].deferred(func, args[1:], kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map_only(LazyTensor, lambda x: x.materialize(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Reached only below __torch_function__, where the gradient path would be lost.
        raise RuntimeError(f"{func} reached a lazy tensor below autograd; call .materialize()")


class LazyHidden(LazyTensor):
    """Stand-in for the final hidden states ``[B, S, H]`` of all ranks.

    Args:
        shard: this rank's ``[B, s, H]``.
        length: S, the whole sequence.
        make: gathers, differentiable; called at most once.
        back: from a gradient of the whole to the shard's.
    """

    shard: Tensor

    @staticmethod
    def __new__(
        cls,
        shard: Tensor,
        length: int,
        make: Callable[[], Tensor],
        back: Callable[[Tensor], Tensor],
    ) -> LazyHidden:
        """A tensor without storage."""
        self = cls._stand_in((shard.shape[0], length, shard.shape[2]), shard, make, shard, back)
        self.shard = shard
        return self

    def deferred(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """A slice that keeps everything is this tensor."""
        if func is not Tensor.__getitem__:
            return None
        index = args[0] if isinstance(args[0], tuple) else args
        whole = all(
            isinstance(i, slice) and i.start in (None, 0) and i.stop is None and i.step in (None, 1)
            for i in index
        )
        return self if whole and len(index) <= 3 else None


def _then(logits: LazyLogits, func: Callable, args: tuple) -> Tensor:
    return func(logits.materialize(), *args)


class LazyLogits(LazyTensor):
    """Stand-in for logits ``[..., V]``, and for what a model makes of them by numbers and tanh.

    Args:
        shape: shape of the whole logits.
        like: tensor whose dtype and device the logits will have.
        make: makes the whole logits, differentiable; called at most once.
        source: what they are made from.
        request: what the loss needs to do without them; opaque here.
        chain: what was done to the head's result, as ``("mul", 2.0)``, ``("tanh", 1.0)``.
    """

    source: Tensor
    request: Any
    chain: tuple[tuple[str, float], ...]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        like: Tensor,
        make: Callable[[], Tensor],
        source: Tensor,
        request: Any,
        chain: tuple[tuple[str, float], ...] = (),
    ) -> LazyLogits:
        """A tensor without storage."""
        self = cls._stand_in(shape, like, make, source, _refuse_gradient)
        self.source, self.request, self.chain = source, request, chain
        return self

    def deferred(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """A product with a number or a tanh is noted; making the result does as the model did."""
        number = len(args) == 1 and type(args[0]) in (int, float)
        if kwargs:
            return None
        if func in _TANHS and not args:
            step = ("tanh", 1.0)
        elif func in _PRODUCTS and number:
            step = ("mul", float(args[0]))
        elif func in _QUOTIENTS and number and args[0]:
            step = ("div", float(args[0]))
        else:
            return None
        with without_torch_function():
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            shape = tuple(self.shape)
        chain = (*self.chain, step)
        make = functools.partial(_then, self, func, args)
        return LazyLogits(shape, like, make, self.source, self.request, chain)

    def scale_and_softcap(self) -> tuple[float, float | None] | None:
        """``(scale, softcap)`` if this is ``softcap * tanh(scale / softcap * logits)``.

        ``(scale, None)`` if it is ``scale * logits``; None if it is neither.
        """
        before = after = 1.0
        capped = False
        for name, number in self.chain:
            factor = 1.0 / number if name == "div" else number
            if name == "tanh" and capped:
                return None
            capped |= name == "tanh"
            before, after = (before, after * factor) if capped else (before * factor, after)
        if not capped:
            return before, None
        return (before * after, after) if after else None
