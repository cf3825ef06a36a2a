"""The tokens of the LM head in chunks: hidden states in, gradients out, for the loss and all alike.

Nothing of the size tokens x vocabulary outlives a chunk. Where hidden states are sequence shards, a
chunk is the same rows of every rank's shard: gathered before its logits, and its gradient is
reduce-scattered to the rows that it came from. On a GPU the next chunk's gather runs beside this
chunk's matrix products, and the reduction of the input's gradient beside the weight's product.

Shape letters: B batch, S sequence, s = ceil(S / tp), R ranks that hold rows of the sequence (1 if
hidden states are replicated), T tokens of a chunk, H hidden, v local vocabulary rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.collectives import Axis
from hf_sp.kernels.cross_entropy_steps import LossTerms
from hf_sp.torch_private import is_fake


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """What is computed, besides tensors."""

    terms: LossTerms  # the distribution, and the loss of a token
    axis: Axis  # who holds the other rows of the vocabulary
    sharded: bool  # whether the hidden states are sequence shards; else they are replicated
    chunk: int  # tokens per chunk, over all ranks


class Chunks:
    """Iterates over ``(hidden states [T, H], labels [T], rows)``, by rank, then row, then batch.

    ``rows`` is the chunk's slice of the source's sequence. The source is the hidden states, ``[B,
    s, H]`` or ``[B, S, H]``; padding at their end gets the label to ignore.

    Collectives: 1 all-gather a chunk, if sharded
    """

    def __init__(self, source: Tensor, labels_BS: Tensor, spec: HeadSpec) -> None:
        self.source, self.spec = source, spec
        self.ranks = spec.axis.size if spec.sharded else 1
        self.length = labels_BS.shape[1]
        B, self.height = source.shape[:2]
        step = max(1, spec.chunk // max(1, B * self.ranks))
        starts = range(0, self.height, step)
        self.pieces = [slice(a, min(a + step, self.height)) for a in starts]
        self.labels_RsB = self.split(labels_BS, spec.terms.ignore_index)

    def split(self, x_BS: Tensor, fill: float = 0) -> Tensor:
        """``[B, S]`` as ``[R, s, B]``, padded."""
        missing = self.ranks * self.height - self.length
        x_SB = F.pad(x_BS, (0, missing), value=fill).t()
        return x_SB.reshape(self.ranks, self.height, -1)

    def join(self, x_RsB: Tensor) -> Tensor:
        """The inverse of ``split``."""
        return x_RsB.flatten(0, 1)[: self.length].t().contiguous()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        H, sharded = self.source.shape[-1], self.spec.sharded
        ahead = self._launch_gather(self.pieces[0]) if sharded and self.pieces else None
        for index, rows in enumerate(self.pieces):
            if ahead is None:
                x = self.source[:, rows].transpose(0, 1)
            else:
                x = comm.wait(ahead)
                if index + 1 < len(self.pieces):
                    # The next chunk is on its way while this one is computed with.
                    ahead = self._launch_gather(self.pieces[index + 1])
            yield x.reshape(-1, H), self.labels_RsB[:, rows].reshape(-1), rows

    def _launch_gather(self, rows: slice) -> Tensor:
        return comm.launch_all_gather(self.source[:, rows].transpose(0, 1), self.spec.axis)


class HeadGradients:
    """Gradients of the hidden states, the head's rows and their bias, summed over the chunks.

    As far as they are needed. Collectives: 1 reduce-scatter a chunk, 1 all-reduce if the hidden
    states are replicated
    """

    def __init__(self, chunks: Chunks, weight_vH: Tensor, needs: tuple[bool, bool, bool]) -> None:
        self.chunks, self.weight, self.needs_head = chunks, weight_vH, needs[1]
        self.wide = torch.promote_types(weight_vH.dtype, torch.float32)
        self.source = torch.empty_like(chunks.source) if needs[0] else None
        # The sum over several chunks is wide; of a single one it is the product.
        summed = needs[1] and len(chunks.pieces) != 1
        self.head = torch.zeros_like(weight_vH, dtype=self.wide) if summed else None
        self.bias = weight_vH.new_zeros(weight_vH.shape[0], dtype=self.wide) if needs[2] else None

    def add(self, grad_Tv: Tensor, x_TH: Tensor, rows: slice) -> None:
        """A chunk's gradient by its logits."""
        dx = None if self.source is None else self.launch(grad_Tv @ self.weight)
        if self.needs_head:
            self.head = _plus_product(self.head, grad_Tv.t(), x_TH)
        if self.bias is not None:
            self.bias += grad_Tv.sum(0, dtype=self.wide)
        if dx is not None:
            self.store(dx, rows)

    def launch(self, dx_TH: Tensor) -> Tensor:
        """Start the reduction of a chunk's partial input gradient."""
        spec = self.chunks.spec
        reduce = comm.launch_reduce_scatter if spec.sharded else comm.launch_all_reduce
        return reduce(dx_TH, spec.axis)

    def store(self, dx: Tensor, rows: slice) -> None:
        """Put a chunk's reduced gradient into its rows of the source's gradient."""
        assert self.source is not None
        B, _, H = self.source.shape
        self.source[:, rows] = comm.wait(dx).view(-1, B, H).transpose(0, 1)


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``total + a @ b``, in the memory of the total, which may be wider than the two."""
    if total is None:
        return a @ b
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    # On a GPU only, which no test on a CPU reaches: cuBLAS adds the product to the wide total.
    if a.is_cuda and not is_fake(a) and _adds_to_float(a.dtype):
        return torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    return total.add_(a @ b)


@functools.cache
def _adds_to_float(dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of half-precision matrices to a float32 one, on CUDA."""
    try:
        one = torch.ones(16, 16, dtype=dtype, device="cuda")
        total = one.float()
        torch.ops.aten.addmm.dtype_out(total, one, one, total.dtype, out=total)
    except (AttributeError, RuntimeError):
        return False
    return bool((total == 17).all())
