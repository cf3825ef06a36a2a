"""The router: HF's own code, on a weight whose product does not save the tokens.

Everything in a sparse block is linear in the gradient that comes in, and each rank computes on its
own part: of the experts' features, or of the tokens. So the router's weight, which is stored whole,
gets a partial gradient, which is summed.

Shape letters: B batch, S sequence, T tokens of the block, E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.comm.parts import gather_take
from hf_sp.model.local import cast_for_autocast, local
from hf_sp.model.parameters import LocalParameters, Partial
from hf_sp.state import ParallelState
from hf_sp.torch_private import tree_map_only

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor | None]
"""Of tokens with weight and bias; None for tokens that it does not know."""


class RouterWeight:
    """What HF's router reads as ``self.weight``: ``F.linear`` with it runs ``linear``.

    No tensor, but to torch's functions like one; its attributes and methods are the weight's.
    """

    def __init__(self, weight: Tensor, linear: Product) -> None:
        self._weight, self._linear = weight, linear

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A linear goes to the block, which knows its tokens; all else is plain."""
        if func is F.linear and 2 <= len(args) <= 3 and not kwargs and isinstance(args[1], cls):
            result = args[1]._linear(args[0], args[1]._weight, *args[2:] or (None,))
            if result is not None:
                return result
        plain = tree_map_only(cls, lambda weight: weight._weight, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class RouterParameters(LocalParameters):
    """Shows the router its weight as a ``RouterWeight``; a column that reads the block's input."""

    def __init__(self, state: ParallelState, module: nn.Module, linear: Product) -> None:
        super().__init__(state, Partial.HEADS)
        self.module, self.linear = module, linear

    def node_parameters(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; their gradients are summed over the ranks."""
        own = (self.module._parameters.get(name) for name in ("weight", "bias"))
        weight, bias = (None if p is None else self._summed(p, like) for p in own)
        return cast(Tensor, weight), bias

    def _summed(self, p: Tensor, like: Tensor) -> Tensor:
        return cast_for_autocast(pairs.identity_allreduce(local(p), self.state.axis), like)

    def show(self, module: nn.Module, args: Any) -> None:
        """Shadow the weight."""
        super().show(module, args)
        module.__dict__["weight"] = RouterWeight(module.__dict__["weight"], self.linear)


def leave_router_logits(
    logits: tuple[Tensor, ...], state: ParallelState, batch: int
) -> tuple[Tensor, ...]:
    """Router logits as HF has them, ``[B * S, E]``, with gradients that count once.

    What is computed from them (the auxiliary loss) is computed alike on all ranks, while the
    router's gradient is a sum over ranks. Where each rank has routed its own tokens, it takes its
    own part; where all have routed all tokens, one rank's gradient counts.
    """
    length = state.length
    assert length is not None

    experts = [block.experts for block in state.plan.blocks if block.experts is not None]
    # Routers outside of blocks route a rank's own tokens, or the same on every rank.
    outside = bool(experts) and not experts[0].router

    def leave(local_TE: Tensor) -> Tensor:
        by_row = local_TE.view(batch, -1, local_TE.shape[-1])
        if state.sharded and (state.plan.ep > 1 or outside):
            full = pairs.allgather_scatter(by_row, length, state.axis)
        elif outside:
            full = by_row
        else:
            # Every rank of tp has routed every token.
            full = pairs.identity_onerank(by_row[:, :length], state.axis)
        if state.cut is not None:
            full = gather_take(full, state.whole_length, state.cut)
        return full.reshape(-1, full.shape[-1])

    return tuple(leave(x) for x in logits)
