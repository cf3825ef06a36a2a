"""Logits that are made only when touched.

HF's forward calls the LM head before it knows of labels, and hands the result to
``loss_function``, which needs no logits where it can run the chunked linear form. So the parallel
head returns a stand-in of the right shape and dtype; the first operation on it makes the whole
logits, with their gradient path. A model that scales or caps its logits touches them and gets what
it computes; none is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hf_sp.torch_private import stand_in, without_torch_function

# What may be asked of the stand-in without making the logits.
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


class LazyLogits(Tensor):
    """Stand-in for logits ``[..., V]``; any operation on it makes them (a collective).

    Args:
        shape: shape of the whole logits.
        like: tensor whose dtype and device the logits will have.
        make: makes the whole logits, differentiable; called at most once.
        request: what the loss needs to do without them; opaque here.
    """

    _make: Callable[[], Tensor]
    _made: Tensor | None
    request: Any

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], like: Tensor, make: Callable[[], Tensor], request: Any
    ) -> LazyLogits:
        """A tensor without storage."""
        self = cast(LazyLogits, stand_in(cls, shape, like))
        self._make, self._made, self.request = make, None, request
        return self

    def materialize(self) -> Tensor:
        """The whole logits; made on the first call, on all ranks together."""
        if self._made is None:
            with without_torch_function():
                self._made = self._make()
        return self._made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with without_torch_function():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(LazyLogits, LazyLogits.materialize, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # Reached only below __torch_function__, where the gradient path would be lost.
        raise RuntimeError(f"{func} reached lazy logits below autograd; call .materialize() first")
