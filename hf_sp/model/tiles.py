"""MLPs that run on tiles of the sequence, one after the other, and again in backward.

So that nothing of the size tokens x features is alive: a tile's entry, products and exit are made,
forgotten, and made again for its gradients. The gradients of the weights are summed over tiles.

Shape letters: B batch, s tokens of this rank's shard, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sp.model.block import get_hidden_states, replace_hidden_states
from hf_sp.model.local import call_through


class SequenceTiles:
    """A call of an MLP, hooks and all, for each tile.

    Shapes:   x [B, s, H] -> the same
    Forward:  the MLP's collectives, of a tile each
    Backward: those of its forward again and of its backward, of a tile each
    Saves:    x

    Args:
        tokens: of this rank's shard, in all rows, that are a tile.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def install(self, mlp: nn.Module) -> None:
        """Put it around the MLP's calls."""
        call_through(mlp, self)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The MLP of all tokens."""
        x = get_hidden_states(args, kwargs)
        step = max(1, self.tokens // max(1, x.shape[0]))
        if x.shape[1] <= step:
            return call(*args, **kwargs)

        # A checkpoint keeps what its function closes over: all tokens are not to be among that.
        others = replace_hidden_states(args, kwargs, x.new_empty(0))

        def of(tile: Tensor) -> Tensor:
            given, named = replace_hidden_states(*others, tile)
            return call(*given, **named)

        if not torch.is_grad_enabled():
            return torch.cat([of(tile) for tile in x.split(step, 1)], 1)
        tiles = [checkpoint(of, tile, use_reentrant=False) for tile in x.split(step, 1)]
        return torch.cat(tiles, 1)
