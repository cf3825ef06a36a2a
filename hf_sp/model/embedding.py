"""Vocab-parallel embedding: each rank holds a range of the vocabulary's rows."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.comm.collectives import Axis
from hf_sp.errors import ShapeError
from hf_sp.kernels.vocab import check_ids, vocab_range
from hf_sp.model.local import local


class VocabParallelEmbedding(nn.Embedding):
    """An ``nn.Embedding`` in place; ``num_embeddings`` stays the whole vocabulary.

    The result is the whole, reduced embedding and not a partial sum: users call
    ``get_input_embeddings()`` themselves, and Trainer hangs noise hooks on it.

    Shapes:   ids [...] int -> [..., H], equal on all ranks
    Forward:  1 all-reduce
    Backward: no collective; the whole output gradient gives each rank's rows
    Saves:    ids, the mask of ids that live elsewhere
    Raises:   ShapeError for an id outside the vocabulary (an assert on the device, on a GPU)
    """

    axis: Axis

    @classmethod
    def convert_(cls, module: nn.Embedding, axis: Axis) -> None:
        """Make an ``nn.Embedding`` one of these, in place."""
        # A scaled one calls what stands behind it in the order of classes.
        kind: Any = type(module)
        module.__class__ = cls if kind is nn.Embedding else _before(kind)
        cast(VocabParallelEmbedding, module).axis = axis

    def forward(self, input: Tensor) -> Tensor:
        """Look up the ids that live here, zeros for the others, and sum over the ranks."""
        check_ids(input, self.num_embeddings, "input_ids", ignore_index=None)
        return self.rows(input, self.padding_idx)

    def rows(self, input: Tensor, padding: int | None = None) -> Tensor:
        """Whole rows of the weight; that of ``padding`` gets no gradient."""
        start, stop = vocab_range(self.num_embeddings, self.axis)
        weight = local(cast(nn.Parameter, self._parameters["weight"]))
        if start == stop:
            # More ranks than rows: nothing lives here. The weight stays in the graph: its gradient
            # is an empty tensor, and the collectives that follow agree.
            rows = weight.sum() * weight.new_zeros(*input.shape, self.embedding_dim)
            return pairs.allreduce_identity(rows, self.axis)
        elsewhere = (input < start) | (input >= stop)
        ids = (input - start).masked_fill(elsewhere, 0)
        if padding is not None:
            padding = padding - start if start <= padding < stop else None
        rows = F.embedding(ids, weight, padding)
        return pairs.allreduce_identity(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.axis)


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
