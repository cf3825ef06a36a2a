"""Hooks where hidden states change between whole and sharded at the ends of the decoder's stack.

- a pre-hook on layer 0 takes the sequence shard. HF derives masks, positions and RoPE from the
  embedding's output before that, over the whole sequence.
- a hook on the final norm gathers the sequence, or leaves that to the loss.

Shape letters: B batch, S sequence, s = S / tp, H hidden.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.model.block import get_hidden_states, replace_hidden_states
from hf_sp.model.lazy import LazyHidden
from hf_sp.state import ParallelState


class StackEntry:
    """Pre-hook of layer 0: replicated ``[B, S, H]`` -> sequence shard ``[B, s, H]``."""

    def __init__(self, state: ParallelState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Scatter; the backward all-gathers."""
        if not self.state.sharded:
            return None
        x = pairs.scatter_allgather(get_hidden_states(args, kwargs), self.state.axis)
        return replace_hidden_states(args, kwargs, x)


class StackExit:
    """Hook of the final norm: sequence shard ``[B, s, H]`` -> replicated ``[B, S, H]``.

    Replicated, because anyone may read ``last_hidden_state``. The LM head recognises it and sends
    its partial gradient to the shard by a reduce-scatter. In a forward that wants the loss alone it
    is a stand-in, which nobody but the head should meet: the loss gathers it by chunks.
    """

    def __init__(self, state: ParallelState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Gather; the backward takes the shard."""
        state = self.state
        if not state.sharded or state.length is None:
            return None
        gather = functools.partial(self.gather, output, state.length)
        if not state.lazy_hidden:
            return gather()
        back = functools.partial(comm.own_shard, axis=state.axis)
        return LazyHidden(output, state.length, gather, back)

    def gather(self, shard_BsH: Tensor, length: int) -> Tensor:
        """The whole hidden states, known to the head."""
        full = pairs.allgather_scatter(shard_BsH, length, self.state.axis)
        # HF's own is contiguous, and people call .view on it. No copy for B = 1.
        full = full.contiguous()
        self.state.remember_hidden(full, shard_BsH)
        return full
