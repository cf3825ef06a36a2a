"""Hooks where hidden states change between whole and sharded.

- entry of the stack: a pre-hook on layer 0 takes the sequence shard. HF derives masks, positions
  and RoPE from the embedding's output before that, over the whole sequence.
- entry and exit of each TP block: gather / reduce-scatter (or, without sp, nothing / all-reduce).
- exit of the stack: a hook on the final norm gathers the sequence, or leaves that to the loss.

Shape letters: B batch, S sequence, s = S / tp, H hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.errors import ShapeError
from hf_sp.model.columns import Entry, enter_block
from hf_sp.model.factors import EntryReader
from hf_sp.model.lazy import LazyHidden
from hf_sp.model.linear import ColumnParallelLinear
from hf_sp.state import ParallelState


def take_hidden(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a module's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def put_hidden(args: tuple, kwargs: dict[str, Any], x: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments with other hidden states."""
    if args:
        return (x, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": x}


def true_length(kwargs: Mapping[str, Any]) -> int | None:
    """Length of the whole sequence, from what HF hands to every attention block.

    Not remembered from the embedding: under gradient checkpointing a block runs again in backward,
    perhaps after another forward.
    """
    embeddings = kwargs.get("position_embeddings")
    if embeddings is not None:
        return embeddings[0].shape[-2]
    positions = kwargs.get("position_ids")
    return None if positions is None else positions.shape[-1]


def readers(module: Any) -> list[EntryReader]:
    """Adapters among a block's children; they come and go, so they are looked up each time."""
    return [child for child in module.children() if hasattr(type(child), "entry_factors")]


class StackEntry:
    """Pre-hook of layer 0: replicated ``[B, S, H]`` -> sequence shard ``[B, s, H]``."""

    def __init__(self, state: ParallelState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Scatter; the backward all-gathers."""
        if not self.state.sharded:
            return None
        x = pairs.scatter_allgather(take_hidden(args, kwargs), self.state.axis)
        return put_hidden(args, kwargs, x)


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


class BlockBoundary:
    """Entry and exit hooks of one TP block.

    Args:
        state: the model's parallel state.
        linears: the block's column linears.
        attention: whether the block needs the true sequence length (padding stripped).
    """

    def __init__(
        self, state: ParallelState, linears: list[ColumnParallelLinear], attention: bool
    ) -> None:
        self.state, self.linears, self.attention = state, linears, attention
        self.entries: list[Entry] = []
        self.dropout = LocalDropout(state)

    def install(self, module: nn.Module) -> None:
        """Register both hooks. The exit also runs, to clean up, if the forward raises."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.leave, prepend=True, always_call=True)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """All-gather the input for the column linears."""
        x = take_hidden(args, kwargs)
        length = true_length(kwargs) if self.attention else None
        if self.attention and length is None and self.state.sharded:
            raise ShapeError(
                "an attention block was called without position_embeddings or position_ids",
                where=type(module).__name__,
                rule="its input is a sequence shard; the whole length is read from these",
            )
        if length is not None:
            self.state.attended = length
        full, entry = enter_block(
            x,
            self.linears,
            self.state.axis,
            sharded=self.state.sharded,
            length=length,
            batch_major=self.attention,
            readers=readers(module),
        )
        self.entries.append(entry)
        if (
            self.attention
            and module.training
            and float(getattr(module, "attention_dropout", False))
        ):
            self.dropout.start(full)
        return put_hidden(args, kwargs, full)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Reduce the block's partial output."""
        self.dropout.stop()
        if not self.entries:
            return None  # the forward failed before our entry ran
        self.entries.pop().close()
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, Tensor):
            return None  # the forward raised: nothing to reduce
        if self.state.sharded:
            x = pairs.reducescatter_allgather(x, self.state.axis)
        else:
            x = pairs.allreduce_identity(x, self.state.axis)
        return (x, *output[1:]) if isinstance(output, tuple) else x


class LocalDropout:
    """Attention dropout with masks of their own on each rank.

    Ranks hold different heads but, seeded alike by Trainer, would drop the same places of each.
    One number is drawn from the default generator, on all ranks alike, and a generator state of
    ``number + rank`` is used inside the block, the rank among all: data parallel groups that were
    seeded alike drop other places, too. Checkpointing restores the default generator before
    it recomputes, so that the same number is drawn and the same masks come back.
    """

    def __init__(self, state: ParallelState) -> None:
        self.state = state
        self._saved: tuple[torch.device, Tensor] | None = None

    def start(self, like: Tensor) -> None:
        """Switch the default generator of ``like``'s device to this rank's stream."""
        # Left over if the block was interrupted: the shared stream has to come back first.
        self.stop()
        if self.state.everyone.size == 1:
            return
        seed = int(torch.randint(2**62, ()))
        device = like.device
        if device.type == "cpu":
            self._saved = (device, torch.get_rng_state())
            torch.default_generator.manual_seed(seed + self.state.everyone.rank)
        else:
            module = torch.get_device_module(device)
            self._saved = (device, module.get_rng_state(device))
            module.manual_seed(seed + self.state.everyone.rank)

    def stop(self) -> None:
        """Give the shared stream back."""
        if self._saved is None:
            return
        (device, state), self._saved = self._saved, None
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
