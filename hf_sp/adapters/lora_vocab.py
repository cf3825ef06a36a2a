"""PEFT's LoRA layers over the vocabulary: head and embedding; and which class a layer gets.

Shape letters: B batch, S sequence, H hidden, V / v whole and local vocabulary, r rank.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from hf_sp.adapters.lora_linear import (
    ColumnLoraLinear,
    ParallelLora,
    ReplicatedLoraLinear,
    RowLoraLinear,
)
from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.kernels.vocab import vocab_range, vocab_sizes
from hf_sp.model.embedding import VocabParallelEmbedding
from hf_sp.model.head import VocabParallelHead
from hf_sp.model.linear import ColumnParallelLinear, RowParallelLinear
from hf_sp.model.local import cast_for_autocast, local
from hf_sp.model.low_rank import low_rank


class HeadLoraLinear(ParallelLora, LoraLinear):
    """LoRA on the vocab-parallel head: A replicated, B the local vocabulary rows.

    The logits are made in full (the chunked loss knows no adapter).

    Shapes:   x [B, S, H] replicated, or its shard [B, s, H] -> [B, S, V]
    Forward:  1 all-gather of the logits that the adapter adds, and 1 of a shard, besides the base's
    Backward: 1 all-reduce of the gradient of A x
    Saves:    x, ``A x``, A, B
    """

    placements = (Replicate(), Shard(0), Shard(0))

    def _axis(self: Any) -> comm.Axis:
        return self.get_base_layer().state.axis

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        A, B = (local(p) for p in self._factors(adapter))
        axis, vocab = self._axis(), self.get_base_layer().vocab
        x = cast_for_autocast(x, x)
        length = self.get_base_layer().state.final_length
        if length is not None:
            # Every rank computes A x of all tokens, and has its whole gradient.
            x = pairs.allgather_scatter(x, length, axis)
        u = low_rank(x, cast_for_autocast(A, x), self._draw(adapter), 0)
        u = pairs.identity_allreduce(u * self.scaling[adapter], axis)
        return pairs.concat_slice(F.linear(u, B), u.dim() - 1, vocab_sizes(vocab, axis), axis)


class ParallelLoraEmbedding(ParallelLora, LoraEmbedding):
    """LoRA on the vocab-parallel embedding: A holds the local vocabulary, B is replicated.

    Shapes:   ids [...] -> [..., H]
    Forward:  1 all-reduce of ``[..., r]``, besides the base's
    Backward: no collective: the output gradient is whole, and so is that of B
    Saves:    ids, a mask, ``A[ids]``, B
    """

    placements = (Shard(1), Replicate(), Replicate())

    def _factors(self: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def _names(self: Any) -> Any:
        return self.lora_embedding_A.keys()

    def _local_delta(self: Any, adapter: str) -> Tensor:
        return super()._local_delta(adapter).t()

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        A, B = (local(p) for p in self._factors(adapter))
        base, axis = self.get_base_layer(), self._axis()
        start, stop = vocab_range(base.num_embeddings, axis)
        if start == stop:
            # Nothing lives here; keep A in the graph, as the base does its weight.
            rows = A.sum() * A.new_zeros(*x.shape, A.shape[0])
        else:
            elsewhere = (x < start) | (x >= stop)
            ids = (x - start).masked_fill(elsewhere, 0)
            padding = base.padding_idx
            if padding is not None:
                padding = padding - start if start <= padding < stop else None
            rows = F.embedding(ids, A.t(), padding).masked_fill(elsewhere.unsqueeze(-1), 0)
        rows = pairs.allreduce_identity(rows, axis)
        return F.linear(rows * self.scaling[adapter], B)


def class_for(layer: LoraLayer) -> type[Any] | None:
    """The class for a stock LoRA layer over a parallel one; None if there is none."""
    base, stock = layer.get_base_layer(), type(layer)
    if stock is LoraEmbedding:
        return ParallelLoraEmbedding if isinstance(base, VocabParallelEmbedding) else None
    if stock is not LoraLinear:
        return None
    for kind, ours in (
        (ColumnParallelLinear, ColumnLoraLinear),
        (RowParallelLinear, RowLoraLinear),
        (VocabParallelHead, HeadLoraLinear),
    ):
        if isinstance(base, kind):
            return ours
    return ReplicatedLoraLinear if type(base) is nn.Linear else None


def placements_of(layer: Any) -> tuple[Placement, Placement, Placement]:
    """Placements of A, B and DoRA's magnitude of one layer."""
    A, B, magnitude = layer.placements
    if isinstance(layer, ColumnLoraLinear) and layer.get_base_layer().rows is not None:
        return A, Replicate(), Replicate()
    return A, B, magnitude
