"""Autograd pairs of collectives, each named ``<forward>_<backward>``: the name is the contract.

None saves a tensor. The classes say what each does; the functions are at the end.

Shape letters: B batch, S full sequence, s = ceil(S / tp), H features. Lower case = local.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis


class _ScatterAllGather(Node):
    """Take this rank's sequence shard of a replicated tensor; the backward all-gathers.

    Shapes:   x [B, S, H] any float dtype, any strides -> [B, s, H], sequence-major inside
    Forward:  no collective; rows are padded with zeros where tp does not divide S
    Backward: 1 all-gather of the gradient shard; padding rows are dropped
    """

    @staticmethod
    def forward(ctx: Any, x_BSH: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.length = axis, x_BSH.shape[1]
        return comm.own_shard(x_BSH, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return comm.gather_sequence(grads[0], ctx.length, ctx.axis), None


class _AllGatherScatter(Node):
    """All-gather a sequence shard for code that is replicated; the backward takes the shard.

    Right only where every rank computes the same thing with the result, so that each holds the
    whole gradient. After tensor-parallel code it is partial: allgather_reducescatter.

    Shapes:   x [B, s, H] -> [B, S, H], S = ``length``
    Forward:  1 all-gather
    Backward: no collective
    """

    @staticmethod
    def forward(ctx: Any, x_BsH: Tensor, length: int, axis: Axis) -> Tensor:
        ctx.axis = axis
        return comm.gather_sequence(x_BsH, length, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return comm.own_shard(grads[0], ctx.axis), None, None


class _AllGatherReduceScatter(_AllGatherScatter):
    """All-gather a sequence shard for tensor-parallel code; the backward reduce-scatters to it.

    Shapes:   x [B, s, H] -> [B, S, H], S = ``length``
    Forward:  1 all-gather
    Backward: 1 reduce-scatter; the gradient must be partial
    Source:   Korthikanti et al. 2022, arXiv:2205.05198, operator g
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return comm.reduce_scatter_sequence(grads[0], ctx.axis), None, None


class _ReduceScatterAllGather(_ScatterAllGather):
    """Reduce-scatter partial sums to sequence shards; the backward all-gathers.

    Shapes:   x [B, S, H] partial -> [B, s, H]
    Forward:  1 reduce-scatter
    Backward: 1 all-gather
    Source:   Korthikanti et al. 2022, arXiv:2205.05198, the conjugate of g
    """

    @staticmethod
    def forward(ctx: Any, x_BSH: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.length = axis, x_BSH.shape[1]
        return comm.reduce_scatter_sequence(x_BSH, axis)


class _PaddedReduceScatterAllGather(Node):
    """As ``reducescatter_allgather``, for what is laid out for the collective already.

    Shapes:   x [tp * s, B, H] partial, sequence-major, with padding rows -> [B, s, H]
    Forward:  1 reduce-scatter
    Backward: 1 all-gather; [tp * s, B, H]
    """

    @staticmethod
    def forward(ctx: Any, x_SBH: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return comm.reduce_scatter(x_SBH, axis).transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return comm.all_gather(grads[0].transpose(0, 1), ctx.axis), None


class _IdentityAllReduce(Node):
    """Hand a replicated tensor to code whose gradient is partial; the backward sums it.

    Shapes:   any -> the same (a view)
    Forward:  no collective
    Backward: 1 all-reduce (sum)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        # Code that has not read it sends nothing, on any rank: nothing is summed. It is what
        # set_materialize_grads does, less a call for each low-rank factor of each layer.
        ctx.materialize_grads = False
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None if grads[0] is None else comm.all_reduce(grads[0], ctx.axis), None


class _IdentityOneRank(_IdentityAllReduce):
    """Hand out what all ranks have computed alike; the backward counts one rank's gradient.

    For what leaves a block whose gradients are partial, and so summed over the ranks, to code that
    is replicated: there each rank holds the whole gradient.

    Shapes:   any -> the same (a view)
    Forward:  no collective
    Backward: no collective; the first rank passes the gradient on, the others zeros
    """

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads[0] is None:
            return None, None
        # Zeros, and not nothing: every rank has to run the same backward.
        return grads[0] if ctx.axis.rank == 0 else torch.zeros_like(grads[0]), None


class _AllReduceIdentity(Node):
    """Sum partial tensors; the backward passes the replicated gradient on.

    Shapes:   any, partial -> the same, replicated
    Forward:  1 all-reduce (sum)
    Backward: no collective
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return comm.all_reduce(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _ConcatSlice(Node):
    """Concatenate the ranks' pieces along ``dim``; the backward takes this rank's slice.

    Used for what leaves the parallel region along a feature dim: logits (vocabulary), attention
    weights (heads). Right only where the result is used alike on all ranks.

    Shapes:   x [.., sizes[rank], ..] -> [.., sum(sizes), ..]
    Forward:  1 all-gather (of the widest piece times tp)
    Backward: no collective
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.dim, ctx.start, ctx.width = dim, sum(sizes[: axis.rank]), x.shape[dim]
        # Ranks may hold different widths (uneven vocabulary): gather at the widest, then strip.
        widest = max(sizes)
        moved = x.movedim(dim, 0)
        if moved.shape[0] < widest:
            fill = moved.new_zeros(widest - moved.shape[0], *moved.shape[1:])
            moved = torch.cat([moved, fill])
        parts = comm.all_gather(moved, axis).split(widest)
        full = torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])
        # HF code calls .view on logits and attention weights.
        return full.movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].narrow(ctx.dim, ctx.start, ctx.width), None, None, None


scatter_allgather = _ScatterAllGather.apply
allgather_scatter = _AllGatherScatter.apply
allgather_reducescatter = _AllGatherReduceScatter.apply
reducescatter_allgather = _ReduceScatterAllGather.apply
padded_reducescatter_allgather = _PaddedReduceScatterAllGather.apply
identity_allreduce = _IdentityAllReduce.apply
identity_onerank = _IdentityOneRank.apply
allreduce_identity = _AllReduceIdentity.apply
concat_slice = _ConcatSlice.apply
