"""The only file that talks to the wire about activations and their gradients.

Each autograd pair is named ``<forward>_<backward>``: the name is the contract. Collectives run on
contiguous dim-0 buffers, so hidden states are handled sequence-major inside and shown to the model
as ``[B, S, H]`` views; with B = 1 nothing is copied.

Shape letters: B batch, S full sequence, s = ceil(S / tp), H features. Lower case = local.

Must not know modules, plans or models. Takes an ``Axis`` (a group by name), never a mesh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hf_sp.comm.autograd import once_differentiable
from hf_sp.torch_private import collective_ops


@dataclass(frozen=True, slots=True)
class Axis:
    """One mesh axis as plain data: can be copied, pickled and passed to autograd Functions.

    Args:
        group: name of the process group.
        size: number of ranks on the axis.
        rank: this rank's place on it.
    """

    group: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> Axis:
        """The axis of a 1-D mesh. The rank comes from the mesh: LocalTensorMode patches it."""
        return cls(mesh.get_group().group_name, mesh.size(), mesh.get_local_rank())


def padded(length: int, size: int) -> int:
    """``length`` rounded up to a multiple of ``size``."""
    return -(-length // size) * size


# --- raw collectives, dim 0, not differentiable -------------------------------------------------


def launch_all_gather(x: Tensor, axis: Axis) -> Tensor:
    """Start an all-gather of ``[n, ...]`` to ``[tp * n, ...]``; read it only after ``wait``."""
    return _launched(collective_ops.all_gather_into_tensor(x.contiguous(), axis.size, axis.group))


def launch_reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Start a summing reduce-scatter of ``[tp * n, ...]`` to ``[n, ...]``."""
    return _launched(
        collective_ops.reduce_scatter_tensor(x.contiguous(), "sum", axis.size, axis.group)
    )


def launch_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Start a sum over the axis; ``x`` is left as it was."""
    return _launched(collective_ops.all_reduce(x.contiguous(), "sum", axis.group))


def launch_all_to_all(x: Tensor, receive: list[int], send: list[int], axis: Axis) -> Tensor:
    """Start an exchange of rows: ``send[r]`` of ``[n, ...]`` go to rank r, in rank order.

    Args:
        x: rows sorted by their destination.
        receive: number of rows that come from each rank.
        send: number of rows that go to each rank.
        axis: the ranks.
    """
    return _launched(collective_ops.all_to_all_single(x.contiguous(), receive, send, axis.group))


def _launched(x: Tensor) -> Tensor:
    # Two collectives in flight at once corrupt gloo's heap now and then (torch 2.13, seen without
    # hf_sp: docs/numerics.md). On CPU each is waited for; nothing could run beside it anyway.
    return wait(x) if x.device.type == "cpu" else x


def wait(x: Tensor) -> Tensor:
    """Block (the stream, on a GPU) until the collective that makes ``x`` is done."""
    return collective_ops.wait_tensor(x)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """All-gather along dim 0."""
    return wait(launch_all_gather(x, axis))


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Summing reduce-scatter along dim 0."""
    return wait(launch_reduce_scatter(x, axis))


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; ``x`` is left as it was."""
    return wait(launch_all_reduce(x, axis))


def all_to_all(x: Tensor, receive: list[int], send: list[int], axis: Axis) -> Tensor:
    """Exchange rows, see ``launch_all_to_all``."""
    return wait(launch_all_to_all(x, receive, send, axis))


# --- sequence layout ----------------------------------------------------------------------------


def pad_sequence(x_SBH: Tensor, axis: Axis) -> Tensor:
    """Zero rows up to a multiple of the axis size. A copy only where rows are missing."""
    missing = padded(x_SBH.shape[0], axis.size) - x_SBH.shape[0]
    if not missing:
        return x_SBH
    return torch.cat([x_SBH, x_SBH.new_zeros(missing, *x_SBH.shape[1:])])


def own_shard(x_BSH: Tensor, axis: Axis) -> Tensor:
    """This rank's sequence shard ``[B, s, H]`` of a replicated tensor, sequence-major inside."""
    x_SBH = x_BSH.transpose(0, 1)
    s = padded(x_SBH.shape[0], axis.size) // axis.size
    # Pad first: the last ranks may own no real row at all (S < tp).
    return pad_sequence(x_SBH, axis).narrow(0, axis.rank * s, s).contiguous().transpose(0, 1)


def gather_sequence(x_BsH: Tensor, length: int | None, axis: Axis) -> Tensor:
    """All ranks' shards as ``[B, S, H]``, padding stripped where ``length`` is given."""
    return all_gather(x_BsH.transpose(0, 1), axis)[:length].transpose(0, 1)


def reduce_scatter_sequence(x_BSH: Tensor, axis: Axis) -> Tensor:
    """Sum of the ranks' partial ``[B, S, H]``, this rank's shard ``[B, s, H]`` of it."""
    return reduce_scatter(pad_sequence(x_BSH.transpose(0, 1), axis), axis).transpose(0, 1)


# --- autograd pairs -----------------------------------------------------------------------------


class _ScatterAllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSH: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.length = axis, x_BSH.shape[1]
        return own_shard(x_BSH, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return gather_sequence(grads[0], ctx.length, ctx.axis), None


class _AllGatherScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BsH: Tensor, length: int, axis: Axis) -> Tensor:
        ctx.axis = axis
        return gather_sequence(x_BsH, length, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return own_shard(grads[0], ctx.axis), None, None


class _GatheredReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BsH: Tensor, full_BSH: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return full_BSH.view_as(full_BSH)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return reduce_scatter_sequence(grads[0], ctx.axis), None, None


class _ReduceScatterAllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSH: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.length = axis, x_BSH.shape[1]
        return reduce_scatter_sequence(x_BSH, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return gather_sequence(grads[0], ctx.length, ctx.axis), None


class _IdentityAllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return all_reduce(grads[0], ctx.axis), None


class _IdentityOneRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # Zeros, and not nothing: every rank has to run the same backward.
        return grads[0] if ctx.axis.rank == 0 else torch.zeros_like(grads[0]), None


class _AllReduceIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _ConcatSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: tuple[int, ...], axis: Axis) -> Tensor:
        ctx.dim, ctx.start, ctx.width = dim, sum(sizes[: axis.rank]), x.shape[dim]
        # Ranks may hold different widths (uneven vocabulary): gather at the widest, then strip.
        widest = max(sizes)
        moved = x.movedim(dim, 0)
        if moved.shape[0] < widest:
            fill = moved.new_zeros(widest - moved.shape[0], *moved.shape[1:])
            moved = torch.cat([moved, fill])
        parts = all_gather(moved, axis).split(widest)
        full = torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])
        # HF code calls .view on logits and attention weights.
        return full.movedim(0, dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].narrow(ctx.dim, ctx.start, ctx.width), None, None, None


def scatter_allgather(x_BSH: Tensor, axis: Axis) -> Tensor:
    """Take this rank's sequence shard of a replicated tensor; the backward all-gathers.

    Shapes:   x [B, S, H] any float dtype, any strides -> [B, s, H], sequence-major inside
    Forward:  no collective; rows are padded with zeros where tp does not divide S
    Backward: 1 all-gather of the gradient shard; padding rows are dropped
    Saves:    nothing
    """
    return _ScatterAllGather.apply(x_BSH, axis)


def allgather_scatter(x_BsH: Tensor, length: int, axis: Axis) -> Tensor:
    """All-gather a sequence shard for code that is replicated; the backward takes the shard.

    Right only where every rank computes the same thing with the result, so that each holds the
    whole gradient. After tensor-parallel code it is partial: gathered_reducescatter.

    Shapes:   x [B, s, H] -> [B, S, H], S = ``length``
    Forward:  1 all-gather
    Backward: no collective
    Saves:    nothing
    """
    return _AllGatherScatter.apply(x_BsH, length, axis)


def gathered_reducescatter(x_BsH: Tensor, full_BSH: Tensor, axis: Axis) -> Tensor:
    """Hand the gathered tensor to tensor-parallel code; the backward reduce-scatters to the shard.

    Shapes:   x [B, s, H], full [B, S, H] = all shards -> full, with x's gradient path
    Forward:  no collective
    Backward: 1 reduce-scatter; the gradient must be partial
    Saves:    nothing
    Source:   Korthikanti et al. 2022, arXiv:2205.05198, operator g without its forward
    """
    return _GatheredReduceScatter.apply(x_BsH, full_BSH.detach(), axis)


def reducescatter_allgather(x_BSH: Tensor, axis: Axis) -> Tensor:
    """Reduce-scatter partial sums to sequence shards; the backward all-gathers.

    Shapes:   x [B, S, H] partial -> [B, s, H]
    Forward:  1 reduce-scatter
    Backward: 1 all-gather
    Saves:    nothing
    Source:   Korthikanti et al. 2022, arXiv:2205.05198, the conjugate of g
    """
    return _ReduceScatterAllGather.apply(x_BSH, axis)


def identity_allreduce(x: Tensor, axis: Axis) -> Tensor:
    """Hand a replicated tensor to code whose gradient is partial; the backward sums it.

    Shapes:   any -> the same (a view)
    Forward:  no collective
    Backward: 1 all-reduce (sum)
    Saves:    nothing
    """
    return _IdentityAllReduce.apply(x, axis)


def identity_onerank(x: Tensor, axis: Axis) -> Tensor:
    """Hand out what all ranks have computed alike; the backward counts one rank's gradient.

    For what leaves a block whose gradients are partial, and so summed over the ranks, to code that
    is replicated: there each rank holds the whole gradient.

    Shapes:   any -> the same (a view)
    Forward:  no collective
    Backward: no collective; the first rank passes the gradient on, the others zeros
    Saves:    nothing
    """
    return _IdentityOneRank.apply(x, axis)


def allreduce_identity(x: Tensor, axis: Axis) -> Tensor:
    """Sum partial tensors; the backward passes the replicated gradient on.

    Shapes:   any, partial -> the same, replicated
    Forward:  1 all-reduce (sum)
    Backward: no collective
    Saves:    nothing
    """
    return _AllReduceIdentity.apply(x, axis)


def concat_slice(x: Tensor, dim: int, sizes: tuple[int, ...], axis: Axis) -> Tensor:
    """Concatenate the ranks' pieces along ``dim``; the backward takes this rank's slice.

    Used for what leaves the parallel region along a feature dim: logits (vocabulary), attention
    weights (heads). Right only where the result is used alike on all ranks.

    Shapes:   x [.., sizes[rank], ..] -> [.., sum(sizes), ..]
    Forward:  1 all-gather (of the widest piece times tp)
    Backward: no collective
    Saves:    nothing
    """
    return _ConcatSlice.apply(x, dim, sizes, axis)
