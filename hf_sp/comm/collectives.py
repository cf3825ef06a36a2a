"""The collectives of a forward and its backward; their autograd pairs are in ``pairs``.

What ranks tell each other beside that (digests, texts, files) goes through ``torch.distributed``
where it is needed.

Collectives run on contiguous dim-0 buffers, so hidden states are handled sequence-major inside and
shown to the model as ``[B, S, H]`` views; with B = 1 nothing is copied.

Shape letters: B batch, S full sequence, s = ceil(S / tp), H features. Lower case = local.

Must not know modules, plans or models. Takes an ``Axis`` (a group by name), never a mesh.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hf_sp.torch_private import below_autograd, collective_ops


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
    op = collective_ops.all_gather_into_tensor.default
    return _launch(op, x.contiguous(), axis.size, axis.group)


def launch_reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Start a summing reduce-scatter of ``[tp * n, ...]`` to ``[n, ...]``."""
    op = collective_ops.reduce_scatter_tensor.default
    return _launch(op, x.contiguous(), "sum", axis.size, axis.group)


def launch_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Start a sum over the axis; ``x`` is left as it was."""
    return _launch(collective_ops.all_reduce.default, x.contiguous(), "sum", axis.group)


def launch_all_reduce_(x: Tensor, axis: Axis) -> Tensor:
    """Start a sum over the axis in the memory of ``x``, which is contiguous and the caller's."""
    if torch.compiler.is_compiling():
        return launch_all_reduce(x, axis)  # a compiler finds by itself that it can be in place
    return _launch(collective_ops.all_reduce_.default, x, "sum", axis.group)


def launch_all_to_all(x: Tensor, receive: list[int], send: list[int], axis: Axis) -> Tensor:
    """Start an exchange of rows of ``[n, ...]``, which are sorted by their destination.

    ``send[r]`` of them go to rank r, and ``receive[r]`` come from it, in rank order.
    """
    op = collective_ops.all_to_all_single.default
    return _launch(op, x.contiguous(), receive, send, axis.group)


def _launch(op: Any, x: Tensor, *args: Any) -> Tensor:
    # On CPU each is waited for at its launch: two at once corrupt the heap in groups of gloo that
    # were made before hf_sp was imported (torch_private.one_gloo_thread).
    # Callers are autograd Functions: nothing is to be recorded.
    with contextlib.nullcontext() if torch.compiler.is_compiling() else below_autograd():
        result = op(x, *args)
        return collective_ops.wait_tensor.default(result) if x.is_cpu else result


def wait(x: Tensor) -> Tensor:
    """Block (the stream, on a GPU) until the collective that makes ``x`` is done."""
    return x if x.is_cpu else collective_ops.wait_tensor.default(x)


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """All-gather along dim 0."""
    return wait(launch_all_gather(x, axis))


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Summing reduce-scatter along dim 0."""
    return wait(launch_reduce_scatter(x, axis))


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis; ``x`` is left as it was."""
    return wait(launch_all_reduce(x, axis))


def all_reduce_(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis in the memory of ``x``, which is contiguous and the caller's."""
    return wait(launch_all_reduce_(x, axis))


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
