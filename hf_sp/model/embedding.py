"""Vocab-parallel embedding: each rank holds a range of the vocabulary's rows."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.comm.collectives import Axis
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
        start, stop = vocab_range(self.num_embeddings, self.axis)
        weight = local(self.weight)
        if start == stop:
            # More ranks than rows: nothing lives here. The weight stays in the graph: its gradient
            # is an empty tensor, and the collectives that follow agree.
            rows = weight.sum() * weight.new_zeros(*input.shape, self.embedding_dim)
            return pairs.allreduce_identity(rows, self.axis)
        elsewhere = (input < start) | (input >= stop)
        ids = (input - start).masked_fill(elsewhere, 0)
        padding = self.padding_idx
        if padding is not None:
            padding = padding - start if start <= padding < stop else None
        rows = F.embedding(ids, weight, padding)
        return pairs.allreduce_identity(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.axis)


@functools.cache
def _before(kind: Any) -> type[nn.Embedding]:
    """The class of a kind whose ``super().forward`` is the vocab-parallel one."""
    bases = (kind, VocabParallelEmbedding)
    return type(kind.__name__, bases, {"__module__": kind.__module__})
