"""Entry and exit of a TP block, as hooks: all-gather and reduce-scatter (without sp: all-reduce).

Shape letters: B batch, S sequence, s = S / tp, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.errors import ShapeError
from hf_sp.model.columns import ColumnLinear, Factor, gather_columns
from hf_sp.model.ports import BlockInput
from hf_sp.state import ParallelState


def get_hidden_states(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a module's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def replace_hidden_states(
    args: tuple, kwargs: dict[str, Any], x: Tensor
) -> tuple[tuple, dict[str, Any]]:
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


def factors_of(module: nn.Module, x: Tensor) -> list[Factor]:
    """Factors of adapters on a block's children; they come and go, so they are looked up."""
    found: list[Factor] = []
    for child in module._modules.values():
        entry = getattr(type(child), "entry_factors", None)
        if entry is not None:
            found += entry(child, x)
    return found


class BlockBoundary:
    """Entry and exit hooks of one TP block.

    Args:
        state: the model's parallel state.
        block: what the block's linears find their input by.
        linears: the block's column linears.
        attention: whether the block needs the true sequence length (padding stripped).
    """

    def __init__(
        self,
        state: ParallelState,
        block: BlockInput,
        linears: Sequence[ColumnLinear],
        attention: bool,
    ) -> None:
        self.state, self.block, self.attention = state, block, attention
        self.linears = [(linear, linear) for linear in linears]
        self.dropout = LocalDropout(state)

    def install(self, module: nn.Module) -> None:
        """Register both hooks. The exit also runs, to clean up, if the forward raises."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.leave, prepend=True, always_call=True)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """All-gather the input for the column linears."""
        state = self.state
        x = get_hidden_states(args, kwargs)
        length = true_length(kwargs) if self.attention else None
        if self.attention and length is None and state.sharded:
            raise ShapeError(
                "an attention block was called without position_embeddings or position_ids",
                where=type(module).__name__,
                rule="its input is a sequence shard; the whole length is read from these",
            )
        gathered = gather_columns(
            x,
            self.linears,
            state.axis,
            sharded=state.sharded,
            length=length,
            batch_major=self.attention,
            factors=factors_of(module, x),
        )
        self.block.gathered = gathered
        if (
            self.attention
            and module.training
            and float(getattr(module, "attention_dropout", False))
        ):
            self.dropout.start(gathered.x)
        return replace_hidden_states(args, kwargs, gathered.x)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Reduce the block's partial output."""
        state, partial = self.state, self.block.partial
        self.dropout.stop()
        self.block.close()
        x = output[0] if isinstance(output, tuple) else output
        if not isinstance(x, Tensor):
            return None  # the forward raised: nothing to reduce
        if not state.sharded:
            x = pairs.allreduce_identity(x, state.axis)
        elif partial is not None and partial[0] is x:
            x = pairs.padded_reducescatter_allgather(partial[1], state.axis)
        else:
            x = pairs.reducescatter_allgather(x, state.axis)
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
