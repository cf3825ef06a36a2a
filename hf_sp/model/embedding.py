"""Vocab-parallel embedding: each rank holds a range of the vocabulary's rows."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.comm.collectives import Axis
from hf_sp.comm.parts import Parts
from hf_sp.errors import ShapeError
from hf_sp.kernels.vocab import check_ids, vocab_range
from hf_sp.model.lazy import LazyHidden
from hf_sp.model.local import local
from hf_sp.state import ParallelState


class VocabParallelEmbedding(nn.Embedding):
    """An ``nn.Embedding`` in place; ``num_embeddings`` stays the whole vocabulary.

    The result is the whole, reduced embedding and not a partial sum: users call
    ``get_input_embeddings()`` themselves, and Trainer hangs noise hooks on it. Inside of a decoder
    whose layers have own tokens it is a ``LazyHidden``, the whole for whoever touches it.

    Shapes:   ids [...] int -> [..., H], equal on all ranks
    Forward:  1 all-reduce; of own tokens 1 reduce-scatter, or without ``sp`` 1 all-reduce of the
              part of this context parallel rank
    Backward: no collective, the whole output gradient gives each rank's rows; of own tokens under
              ``sp`` 1 all-gather
    Saves:    ids, the mask of ids that live elsewhere
    Raises:   ShapeError for an id outside the vocabulary (an assert on the device, on a GPU)
    """

    axis: Axis
    state: ParallelState | None

    @classmethod
    def convert_(cls, module: nn.Embedding, axis: Axis, state: ParallelState | None = None) -> None:
        """Make an ``nn.Embedding`` one of these, in place.

        ``state``: of the decoder whose hidden states it makes; None for other embeddings.
        """
        # A scaled one calls what stands behind it in the order of classes.
        kind: Any = type(module)
        module.__class__ = cls if kind is nn.Embedding else _before(kind)
        self = cast(VocabParallelEmbedding, module)
        self.axis, self.state = axis, state

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the vocabulary; inside of a sharded decoder a stand-in for them."""
        check_ids(input, self.num_embeddings, "input_ids", ignore_index=None)
        state = self.state
        if state is None or not state.takes_own_tokens or torch.compiler.is_compiling():
            return self._whole(input)
        own = functools.partial(self._own, input, state.cut, state.sharded)
        weight = local(cast(nn.Parameter, self._parameters["weight"]))
        shape = (*input.shape, self.embedding_dim)
        return LazyHidden(shape, weight, lambda: self._whole(input), weight, own)

    def _whole(self, ids: Tensor) -> Tensor:
        return self.rows(ids, self.padding_idx)

    def _own(self, ids_BS: Tensor, parts: Parts | None, sharded: bool) -> Tensor:
        """This rank's tokens; padding is zeros, as an id that lives nowhere."""
        ids = ids_BS if parts is None else parts.take(ids_BS, 1, -1)
        rows = self._partial(ids, self.padding_idx)
        if sharded:
            return pairs.reducescatter_allgather(rows, self.axis)
        return pairs.allreduce_identity(rows, self.axis)

    def rows(self, input: Tensor, padding: int | None = None) -> Tensor:
        """Whole rows of the weight; that of ``padding`` gets no gradient."""
        return pairs.allreduce_identity(self._partial(input, padding), self.axis)

    def _partial(self, input: Tensor, padding: int | None) -> Tensor:
        """Rows of the ids that live here, zeros for the others."""
        start, stop = vocab_range(self.num_embeddings, self.axis)
        weight = local(cast(nn.Parameter, self._parameters["weight"]))
        if start == stop:
            # More ranks than rows: nothing lives here. The weight stays in the graph: its gradient
            # is an empty tensor, and the collectives that follow agree.
            return weight.sum() * weight.new_zeros(*input.shape, self.embedding_dim)
        elsewhere = (input < start) | (input >= stop)
        ids = (input - start).masked_fill(elsewhere, 0)
        if padding is not None:
            padding = padding - start if start <= padding < stop else None
        rows = F.embedding(ids, weight, padding)
        # In place: a copy would be of as many tokens.
        return rows.masked_fill_(elsewhere.unsqueeze(-1), 0)


class Rows:
    """Stands in for the weight of an embedding while what is around the decoder runs.

    A row that is read there (Gemma 4's, for padding in the place of pictures) is whole.
    """

    def __init__(self, embedding: VocabParallelEmbedding) -> None:
        self.embedding = embedding

    def __getitem__(self, index: Any) -> Tensor:
        """Collectives: 1 all-reduce."""
        row, *others = index if isinstance(index, tuple) else (index,)
        if type(row) is not int or any(other != slice(None) for other in others):
            raise ShapeError(
                "an embedding whose vocabulary is split was read other than by row",
                got=f"weight[{index}]",
                rule="each rank has a part of the rows; one of them is given whole",
                legal="weight[number], weight[number, :]",
            )
        ids = torch.tensor(row % self.embedding.num_embeddings, device=self.device)
        return self.embedding.rows(ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.embedding._parameters["weight"], name)

    @classmethod
    def install(cls, embedding: nn.Module, around: nn.Module) -> None:
        """Hooks of the module that owns the decoder."""
        around.register_forward_pre_hook(functools.partial(cls.show, embedding))
        around.register_forward_hook(functools.partial(cls.hide, embedding), always_call=True)

    @staticmethod
    def show(embedding: nn.Module, around: nn.Module, args: Any) -> None:
        """In front of the registered parameter."""
        embedding.__dict__["weight"] = Rows(cast(VocabParallelEmbedding, embedding))

    @staticmethod
    def hide(embedding: nn.Module, around: nn.Module, args: Any, out: Any) -> None:
        """Give it back."""
        embedding.__dict__.pop("weight", None)


@functools.cache
def _before(kind: Any) -> type[nn.Embedding]:
    """The class of a kind whose ``super().forward`` is the vocab-parallel one."""
    bases = (kind, VocabParallelEmbedding)
    return type(kind.__name__, bases, {"__module__": kind.__module__})
