"""Hooks where hidden states change between whole and sharded at the ends of the decoder's stack.

- a pre-hook on layer 0 takes the sequence shard. HF derives masks, positions and RoPE from the
  embedding's output before that, over the whole sequence.
- a hook on the final norm gathers the sequence, or leaves that to the head.

Shape letters: B batch, S sequence, s = S / tp, H hidden.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.model.block import get_hidden_states, replace_hidden_states
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

    Replicated, because anyone may read ``last_hidden_state``. Where only the head meets it, the
    shard stays: ``state.final_hidden`` says so, and the head gathers it by chunks.
    """

    def __init__(self, state: ParallelState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Gather; the backward takes the shard."""
        state = self.state
        if not state.sharded or state.length is None:
            return None
        if state.final_hidden == "shard":
            state.final_length = state.length
            return None
        full = pairs.allgather_scatter(output, state.length, state.axis)
        # HF's own is contiguous, and people call .view on it. No copy for B = 1.
        return full.contiguous()
