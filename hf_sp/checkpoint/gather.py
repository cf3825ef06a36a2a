"""Shards to whole tensors, for the one rank that writes them, when it wants them.

Weights are written as whole tensors under Hugging Face's names. The writing rank runs other
packages' code, which decides what is written in which order; the others serve what it asks for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sp.checkpoint.ranks import listing, ranks_of
from hf_sp.errors import CheckpointError
from hf_sp.torch_private import tree_map_only, without_torch_function


class Gatherer:
    """Whole tensors, one at a time: ``with`` on every rank; the first asks, the others serve.

    A rank that is not the first stays at the beginning of the block until the first leaves it.

    Args:
        model: the parallelized model.
        values: what can be asked for, ``model.state_dict()`` if None. The first rank's names count.

    Raises:
        CheckpointError: another rank lacks a parameter that the first rank has.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Any] | None = None) -> None:
        self.values = dict(model.state_dict() if values is None else values)
        self.ranks = ranks_of(model)
        self._last: tuple[str, Tensor] | None = None

    def __enter__(self) -> Gatherer:
        mine = [k for k, v in self.values.items() if isinstance(v, DTensor)]
        absent = self.ranks.gather(sorted(set(self.ranks.tell(mine)) - set(mine)))
        if any(absent):
            raise CheckpointError(
                "the ranks were asked to save different parameters",
                got=listing(f"rank {r} lacks {k}" for r, keys in enumerate(absent) for k in keys),
                rule="all ranks save the same names",
            )
        while not self.ranks.first and (name := self.ranks.tell("")):
            whole(self.values[name])
        return self

    def __exit__(self, *error: object) -> None:
        if self.ranks.first:
            self.ranks.tell("")

    def __call__(self, name: str) -> Any:
        """The whole value on the CPU. To be called on the first rank; the last one is kept."""
        if self._last is None or self._last[0] != name:
            self._last = None
            value = self.values[name]
            if isinstance(value, DTensor):
                self.ranks.tell(name)
            self._last = name, whole(value).cpu() if isinstance(value, Tensor) else value
        return self._last[1]


def whole(x: Tensor) -> Tensor:
    """The whole tensor of a DTensor (a collective), any other tensor as it is."""
    with torch.no_grad():
        return x.full_tensor() if isinstance(x, DTensor) else x.detach()


class Later(Tensor):
    """A tensor of a shape and a dtype whose values are made when they are written.

    Operations are noted and carried out then. On the meta device, where transformers and
    safetensors read no values.
    """

    _make: Callable[[], Tensor]

    @staticmethod
    def of(like: Tensor, make: Callable[[], Tensor]) -> Later:
        """A stand-in of that shape and dtype."""
        made = torch.empty(like.shape, dtype=like.dtype, device="meta").as_subclass(Later)
        made._make = make
        return made

    def made(self) -> Tensor:
        """The values, in memory of their own."""
        x = self._make().contiguous()
        return x if x.untyped_storage().nbytes() == x.nbytes else x.clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it to the shape now, to the values later."""
        kwargs = kwargs or {}
        with without_torch_function():
            found = func(*args, **kwargs)

        def now() -> Any:
            real, named = tree_map_only(Later, lambda x: x._make(), (args, kwargs))
            return func(*real, **named)

        if isinstance(found, Tensor):
            return Later.of(found, now)
        if isinstance(found, tuple | list) and any(isinstance(x, Tensor) for x in found):
            picks = [functools.partial(lambda i: now()[i], i) for i in range(len(found))]
            return tuple(map(Later.of, found, picks))
        return found


def gather_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any] | None = None, *, keep: bool = True
) -> dict[str, Any]:
    """Whole tensors of a parallelized model, on the CPU of the first rank if it keeps them.

    To be called on every rank. One tensor is whole at a time; other ranks return an empty dict.
    Names that share one parameter share one tensor in the result.

    Args:
        model: the parallelized model.
        state_dict: what to gather, ``model.state_dict()`` if None. The first rank's names count.
        keep: whether this rank wants the result.
    """
    result: dict[str, Any] = {}
    identity = {k: id(p) for k, p in model.named_parameters(remove_duplicate=False)}
    made: dict[Any, Any] = {}
    with Gatherer(model, state_dict) as gatherer:
        for name in gatherer.values if keep and gatherer.ranks.first else ():
            key = identity.get(name, name)
            if key not in made:
                made[key] = gatherer(name)
            result[name] = made[key]
    return result
