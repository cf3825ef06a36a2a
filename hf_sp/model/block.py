"""Hooks where hidden states change between whole and sharded: of a TP block, and of the stack.

Entry and exit of a block: all-gather and reduce-scatter (without sp: all-reduce). The call of
layer 0 takes the sequence shard: HF derives masks, positions and RoPE from the embedding's output
before that, over the whole sequence. A hook on the final norm gathers, or leaves that to the head.

Shape letters: B batch, S sequence, s = S / tp, H hidden.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.comm.parts import Parts, gather_take, take_gather
from hf_sp.errors import ShapeError
from hf_sp.model.columns import ColumnLinear, Factor, gather_columns
from hf_sp.model.lazy import LazyHidden
from hf_sp.model.local import call_through
from hf_sp.model.ports import BlockInput
from hf_sp.model.streams import LocalDropout
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
    if isinstance(embeddings, LengthAlone):
        return embeddings.length
    if embeddings is not None:
        return embeddings[0].shape[-2]
    positions = kwargs.get("position_ids")
    return None if positions is None else positions.shape[-1]


class LengthAlone:
    """What layers of a decoder without positions are given in the place of these."""

    def __init__(self, length: int) -> None:
        self.length = length

    @classmethod
    def install(cls, layer: nn.Module, state: ParallelState) -> None:
        """Around its calls: a layer that runs again in backward is given the same."""
        call_through(layer, functools.partial(cls.tell, state))

    @classmethod
    def tell(
        cls, state: ParallelState, layer: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Call it with the length of the whole sequence."""
        if kwargs.get("position_embeddings") is None:
            kwargs["position_embeddings"] = cls(state.whole_length)
        return layer(*args, **kwargs)


CACHES = ("cache", "past_key_values")
"""What transformers calls it, the newer name first."""


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

    ``attention``: it needs the true sequence length, padding stripped; it has that many ``heads``.
    ``own``, if set, makes its arguments of a whole sequence those of this rank's part, and is told
    the whole length.
    """

    own: Callable[[dict[str, Any], int, Parts], dict[str, Any]] | None = None

    def __init__(
        self,
        state: ParallelState,
        block: BlockInput,
        linears: Sequence[ColumnLinear],
        attention: bool,
        heads: int = 0,
    ) -> None:
        self.state, self.block, self.attention, self.heads = state, block, attention, heads
        self.linears = [(linear, linear) for linear in linears]
        self.dropout = LocalDropout(state)
        self.length: int | None = None
        """Of the whole sequence, for a block that is not told it: its layer's hook notes it."""

    def install(self, module: nn.Module) -> None:
        """Register both hooks. The exit also runs, to clean up, if the forward raises."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.leave, prepend=True, always_call=True)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """All-gather the input for the column linears."""
        state = self.state
        x = get_hidden_states(args, kwargs)
        length = true_length(kwargs) or self.length if self.attention else None
        if isinstance(kwargs.get("position_embeddings"), LengthAlone):
            kwargs = {**kwargs, "position_embeddings": None}
        parts = None if self.own is None else state.cut
        if self.attention and length is None and (parts is not None or state.sharded):
            raise ShapeError(
                "an attention block was called without position_embeddings or position_ids",
                where=type(module).__name__,
                rule="its input is a sequence shard; the whole length is read from these",
            )
        if parts is not None:
            assert length is not None
            assert self.own is not None
            kwargs = self.own(kwargs, length, parts)
        gathered = gather_columns(
            x,
            self.linears,
            state.axis,
            sharded=state.sharded,
            length=length if parts is None else None,  # a part has no padding that tp does
            batch_major=self.attention,
            factors=factors_of(module, x),
        )
        self.block.gathered = gathered
        drops = self.attention and module.training
        # A layer that drops hidden states too has a stream already.
        p = drops and not state.plan.dropout and getattr(module, "attention_dropout", False)
        if float(getattr(p, "p", p)):
            self.dropout.start(gathered.x)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == self.heads > 1:
            own = self.heads // state.tp
            kwargs = {**kwargs, "attention_mask": mask.narrow(1, state.rank * own, own)}
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


class OwnTokens:
    """Hook of a layer: of arguments with a row for each token, this rank's own rows.

    Backward: 1 all-gather of each one's gradient, which is the same on all ranks then.
    """

    def __init__(self, state: ParallelState, names: Sequence[str]) -> None:
        self.state, self.names = state, names

    def install(self, layer: nn.Module) -> None:
        """Register it."""
        layer.register_forward_pre_hook(self.take, with_kwargs=True)

    def take(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """``[B, S, ...]`` -> ``[B, s, ...]``."""
        if not self.state.sharded:
            return None
        positions = dict(enumerate(inspect.signature(layer.forward).parameters))
        args = tuple(self._own(x, positions.get(i, "")) for i, x in enumerate(args))
        return args, {name: self._own(x, name) for name, x in kwargs.items()}

    def _own(self, x: Any, name: str) -> Any:
        if name not in self.names or not isinstance(x, Tensor):
            return x
        return pairs.scatter_allgather(x, self.state.axis)


class StackBoundary:
    """The ends of the decoder's stack: a call of layer 0, a hook of the final norm."""

    def __init__(self, state: ParallelState) -> None:
        self.state = state

    def install(self, first: nn.Module, norm: nn.Module) -> None:
        """Put them there.

        A call, because transformers before 5.24 checkpoints a layer with its hooks: the checkpoint
        would keep what these are given.
        """
        call_through(first, self.call)
        norm.register_forward_hook(self.leave, prepend=True)

    def call(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Of layer 0: replicated ``[B, S, H]`` -> shard ``[B, s, H]``; the backward all-gathers."""
        state, x = self.state, get_hidden_states(args, kwargs)
        if isinstance(x, LazyHidden) and x.made:
            x = x.materialize()
        if isinstance(x, LazyHidden):
            x = x.own()
        elif state.cut is not None:
            x = take_gather(x, state.cut, state.axis if state.sharded else None)
        elif state.sharded:
            x = pairs.scatter_allgather(x, state.axis)
        args, kwargs = replace_hidden_states(args, kwargs, x)
        return layer(*args, **kwargs)

    def leave(self, norm: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Of the final norm: shard -> replicated; the backward takes the shard.

        Replicated, because anyone may read ``last_hidden_state``. Where only the head meets it, the
        shard stays: ``state.final_hidden`` says so, and the head gathers it by chunks.
        """
        state = self.state
        if state.length is None or (not state.sharded and state.cut is None):
            return None
        if state.final_hidden == "shard":
            state.final_length = state.length
            return None
        # HF's own is contiguous, and people call .view on it. No copy for B = 1.
        return whole_hidden(output, state).contiguous()


def whole_hidden(x: Tensor, state: ParallelState) -> Tensor:
    """Hidden states between two layers as ``[B, S, H]``, for code that is the same on all ranks."""
    assert state.length is not None
    if state.sharded:
        x = pairs.allgather_scatter(x, state.length, state.axis)
    return x if state.cut is None else gather_take(x, state.whole_length, state.cut)
