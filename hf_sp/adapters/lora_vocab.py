"""PEFT's LoRA layers over the vocabulary: head and embedding; and which class a layer gets.

Shape letters: B batch, S sequence, H hidden, V / v whole and local vocabulary, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard

from hf_sp.adapters.lora_linear import (
    ColumnLoraLinear,
    ParallelLora,
    ReplicatedLoraLinear,
    RowLoraLinear,
)
from hf_sp.comm import pairs
from hf_sp.kernels.vocab import vocab_range, vocab_sizes
from hf_sp.model.embedding import VocabParallelEmbedding
from hf_sp.model.head import VocabParallelHead
from hf_sp.model.linear import ColumnParallelLinear, RowParallelLinear
from hf_sp.model.local import cast_for_autocast, local


class HeadLoraLinear(ParallelLora, LoraLinear):
    """LoRA on the vocab-parallel head: A replicated, B the local vocabulary rows.

    The logits are made in full (the chunked loss knows no adapter).

    Shapes:   x [B, S, H] replicated, or its shard [B, s, H] -> [B, S, V]
    Forward:  1 all-gather of the logits that the adapter adds, and 1 of a shard, besides the base's
    Backward: 1 all-reduce of the gradient of A x
    Saves:    x, ``A x``, A, B
    """

    placements = (Replicate(), Shard(0), Shard(0))

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        A, B = (local(p) for p in self._factors(adapter))
        axis, head = self.axis, self.get_base_layer()
        length = head.state.final_length
        if length is not None:
            # Every rank computes A x of all tokens, and has its whole gradient.
            x = pairs.allgather_scatter(cast_for_autocast(x, x), length, axis)
        u = self._summed(self._low_rank(adapter, x, A))
        return pairs.concat_slice(F.linear(u, B), u.dim() - 1, vocab_sizes(head.vocab, axis), axis)


class ParallelLoraEmbedding(ParallelLora, LoraEmbedding):
    """LoRA on the vocab-parallel embedding: A holds the local vocabulary, B is replicated.

    Shapes:   ids [...] -> [..., H]
    Forward:  1 all-reduce of ``[..., r]``, besides the base's
    Backward: no collective: the output gradient is whole, and so is that of B
    Saves:    ids, ``A[ids]``, B
    """

    placements = (Shard(1), Replicate(), Replicate())

    def _factors(self: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]

    def _local_delta(self: Any, adapter: str) -> Tensor:
        return super()._local_delta(adapter).t()

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        A, B = (local(p) for p in self._factors(adapter))
        base, axis = self.get_base_layer(), self.axis
        start, stop = vocab_range(base.num_embeddings, axis)
        # What lives elsewhere has a row of zeros behind those that live here, if any.
        ids = torch.where((x < start) | (x >= stop), stop, x) - start
        padding = base.padding_idx
        if padding is not None:
            padding = padding - start if start <= padding < stop else None
        rows = F.embedding(ids, F.pad(A.t(), (0, 0, 0, 1)), padding)
        rows = pairs.allreduce_identity(rows, axis)
        return F.linear(rows * self.scaling[adapter], B)


CLASSES: dict[tuple[type, type], type[ParallelLora]] = {
    (LoraLinear, ColumnParallelLinear): ColumnLoraLinear,
    (LoraLinear, RowParallelLinear): RowLoraLinear,
    (LoraLinear, nn.Linear): ReplicatedLoraLinear,
    (LoraLinear, VocabParallelHead): HeadLoraLinear,
    (LoraEmbedding, VocabParallelEmbedding): ParallelLoraEmbedding,
}
"""What a stock LoRA layer of one class over a base of another becomes."""
