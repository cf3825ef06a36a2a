"""Tensors that are made only when touched: logits, the embedding's output, the head's weight.

HF's forward calls the LM head before it knows of labels, and hands the result to
``loss_function``, which needs no logits where it can run the chunked linear form. So the parallel
head returns a stand-in. The first operation on it makes the whole tensor, with its gradient path;
let through are a number's product and a tanh, which the loss can apply by itself.

Likewise what the embedding returns where layer 0 wants this rank's tokens of it alone; let through
are what does not mix tokens, a number's product, and what a hook for checkpointing asks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.errors import ConfigError
from hf_sp.torch_private import stand_in, tree_map_only, without_torch_function

# What may be asked of a stand-in without making the tensor.
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad")
_METHODS = ("size", "dim", "ndimension", "element_size", "__len__")
_FUNCTIONS = ("numel", "is_floating_point", "is_complex")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(Tensor, name) for name in (*_METHODS, *_FUNCTIONS)),
    *(getattr(torch, name) for name in _FUNCTIONS),
}
_PRODUCTS = {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul}
_QUOTIENTS = {Tensor.div, Tensor.__truediv__, torch.div}
_TANHS = {Tensor.tanh, torch.tanh}
# (scale, softcap) of ``softcap * tanh(scale / softcap * logits)``, (scale, None) without a tanh.
Mapping = tuple[float, float | None]


class _Carry(torch.autograd.Function):
    """Gives a stand-in a gradient path of its own.

    An operation makes the whole tensor and goes on with that. A foreign autograd Function does not
    ask: the stand-in itself is its input, is made inside its forward, and is sent its gradient.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, what: str, build: Callable[[], Tensor]) -> Tensor:
        ctx.what = what
        return build()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ConfigError(
            "a tensor that had not been made was given to an autograd Function",
            got=ctx.what,
            rule="it is made by the first operation on it; a Function's apply is none",
            remedy="give the Function its .clone()",
        )


class LazyWeight:
    """What a forward of somebody's own reads as its module's weight: the whole, when touched."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = functools.cache(make)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._make()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = tree_map_only(cls, lambda weight: weight._make(), (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class LazyTensor(Tensor):
    """Stand-in for a tensor that any operation on it makes: a collective, on all ranks alike.

    Args:
        shape: shape of the whole tensor.
        like: tensor whose dtype and device it will have.
        make: makes the whole tensor, differentiable; called at most once.
        source: what it is made from.
    """

    source: Tensor
    _make: Callable[[], Tensor] | None
    _made: Tensor | None
    _modes: tuple[bool, bool]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], like: Tensor, make: Callable[[], Tensor], source: Tensor
    ) -> Any:
        """A tensor without storage."""
        build = functools.partial(stand_in, cls, shape, like)
        carried = torch.is_grad_enabled() and source.requires_grad
        self: Any = _Carry.apply(source, cls.__name__, build) if carried else build()
        self.source, self._make, self._made = source, make, None
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
            self._made = self.as_then(self._make)
            # What it was made from is not kept for it any longer.
            self._make = None
        return self._made

    def as_then(self, make: Callable[[], Tensor]) -> Tensor:
        """What is made where the tensor would have been made.

        The first to touch it may do so under no_grad, and the gradient path is for those who come
        after.
        """
        grad, inference = self._modes
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):  # noqa: SIM117
            with without_torch_function():
                found = make()
        # A leaf, for a hook that has asked for gradients behind frozen weights.
        return found.requires_grad_() if self.requires_grad and not found.requires_grad else found

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
        raise RuntimeError(f"{func} reached {cls.__name__} below autograd; call .materialize()")

    def deferred(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
        """What an operation gives that need not make it; None: make it."""
        raise NotImplementedError


class LazyLogits(LazyTensor):
    """Stand-in for logits ``[..., V]``, and for what a model makes of them by numbers and tanh.

    Args:
        shape: shape of the whole logits.
        like: tensor whose dtype and device the logits will have.
        make: makes the whole logits, differentiable; called at most once.
        source: what they are made from.
        request: what the loss needs to do without them; opaque here.
        mapping: what was done to the head's result; None if the loss does not know that.
    """

    request: Any
    mapping: Mapping | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        like: Tensor,
        make: Callable[[], Tensor],
        source: Tensor,
        request: Any,
        mapping: Mapping | None = (1.0, None),
    ) -> LazyLogits:
        """A tensor without storage."""
        self = cast(LazyLogits, LazyTensor.__new__(cls, shape, like, make, source))
        self.request, self.mapping = request, mapping
        return self

    def deferred(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> LazyLogits | None:
        """A product with a number or a tanh is noted; making the result does as the model did."""
        scale, cap = self.mapping or (1.0, None)
        number = len(args) == 1 and type(args[0]) in (int, float)
        mapping: Mapping | None
        if kwargs:
            return None
        if func in _TANHS and not args:
            mapping = (scale, 1.0) if cap is None else None
        elif number and (func in _PRODUCTS or (func in _QUOTIENTS and args[0])):
            factor = args[0] if func in _PRODUCTS else 1.0 / args[0]
            mapping = scale * factor, None if cap is None else cap * factor
        else:
            return None
        make = lambda: func(self.materialize(), *args)  # noqa: E731
        mapping = self.mapping and mapping
        return LazyLogits(tuple(self.shape), self, make, self.source, self.request, mapping)

    def scale_and_softcap(self) -> Mapping | None:
        """What the loss has to do to the head's result; None if it cannot."""
        return None if self.mapping is None or self.mapping[1] == 0 else self.mapping


class LazyHidden(LazyTensor):
    """Stand-in for hidden states ``[B, S, H]`` of which layer 0 wants this rank's tokens.

    Args:
        shape: shape of the whole.
        like: tensor whose dtype and device it will have.
        make: makes the whole, differentiable; called at most once.
        source: what it is made from.
        own: makes this rank's tokens of it; called at most once.
    """

    _own: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        like: Tensor,
        make: Callable[[], Tensor],
        source: Tensor,
        own: Callable[[], Tensor],
    ) -> LazyHidden:
        """A tensor without storage."""
        self = cast(LazyHidden, LazyTensor.__new__(cls, shape, like, make, source))
        self._own = own
        return self

    def own(self) -> Tensor:
        """This rank's tokens, where nobody has touched the whole; on all ranks together."""
        return self.as_then(self._own)

    def deferred(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> LazyHidden | None:
        """Products with a number, dropout that drops nothing, and the wish for gradients."""
        if func is Tensor.requires_grad_ and args in ((), (True,)) and not kwargs:
            if not self.requires_grad:
                with without_torch_function():
                    Tensor.requires_grad_(self)
            return self
        if func is F.dropout and not args:
            idle = not kwargs.get("training", True) or kwargs.get("p", 0.5) == 0
            return self if idle else None
        number = len(args) == 1 and (
            type(args[0]) in (int, float)
            or (type(args[0]) is Tensor and args[0].dim() == 0 and not args[0].requires_grad)
        )
        if not number or kwargs or func not in _PRODUCTS | _QUOTIENTS:
            return None
        make = lambda: func(self.materialize(), *args)  # noqa: E731
        # A wider factor of no dimension leaves the dtype of what has some.
        return LazyHidden(tuple(self.shape), self, make, self, lambda: func(self.own(), *args))
