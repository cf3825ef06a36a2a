"""Logits that are made only when touched.

HF's forward calls the LM head before it knows of labels, and hands the result to
``loss_function``, which needs no logits where it can run the chunked linear form. So the parallel
head returns a stand-in. The first operation on it makes the whole tensor, with its gradient path;
let through are a number's product and a tanh, which the loss can apply by itself. And the head's
whole weight, likewise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from hf_sp.errors import ConfigError
from hf_sp.torch_private import stand_in, tree_map_only, without_torch_function

# What may be asked of a stand-in without making the tensor.
_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "is_cuda")
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
    def forward(ctx: Any, source: Tensor, build: Callable[[], Tensor]) -> Tensor:
        return build()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ConfigError(
            "logits that had not been made were given to an autograd Function",
            rule="hf_sp cannot tell how its gradient reaches the head",
            remedy="parallelize(..., keep_logits=True)",
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


class LazyLogits(Tensor):
    """Stand-in for logits ``[..., V]``, and for what a model makes of them by numbers and tanh.

    Any operation on it makes it: a collective, on all ranks alike.

    Args:
        shape: shape of the whole logits.
        like: tensor whose dtype and device the logits will have.
        make: makes the whole logits, differentiable; called at most once.
        source: what they are made from.
        request: what the loss needs to do without them; opaque here.
        mapping: what was done to the head's result; None if the loss does not know that.
    """

    source: Tensor
    request: Any
    mapping: Mapping | None
    _make: Callable[[], Tensor] | None
    _made: Tensor | None
    _modes: tuple[bool, bool]

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
        build = functools.partial(stand_in, cls, shape, like)
        carried = torch.is_grad_enabled() and source.requires_grad
        self = cast(LazyLogits, _Carry.apply(source, build) if carried else build())
        self.source, self.request, self.mapping = source, request, mapping
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

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with without_torch_function():
                return func(*args, **kwargs)
        if args and isinstance(args[0], LazyLogits) and not args[0].made:
            result = args[0].deferred(func, args[1:], kwargs)
            if result is not None:
                return result
        args, kwargs = tree_map_only(LazyLogits, lambda x: x.materialize(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Reached only below __torch_function__, where the gradient path would be lost.
        raise RuntimeError(f"{func} reached lazy logits below autograd; call .materialize()")

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
