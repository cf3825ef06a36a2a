"""Each autograd pair against its definition, in one process, by LocalTensorMode.

LocalTensorMode runs one program for several ranks at once, so that a whole world's tensors can be
looked at; it cannot find deadlocks, which is what the runs on real ranks are for. Truth: the pair's
forward and backward written on the list of all ranks' tensors. float64, sums of at most four terms:
differences are of rounding order, 1e-15 of the largest term; 1e-12 leaves room for nothing else.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _local_tensor as lt
from torch.distributed.device_mesh import init_device_mesh

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.comm.collectives import Axis
from hf_sp.estimate.simulate import fake_world

B, H = 2, 3


@pytest.fixture(params=[2, 3, 4], ids="tp{}".format)
def world(request):
    with fake_world(request.param):
        yield request.param


def _each(world, make):
    """A LocalTensor made of one tensor a rank."""
    ranks = getattr(lt, "rank_map", None) or (lambda f: lt.local_tensor_mode().rank_map(f))
    return ranks(make)


def _run(world, pair, inputs, grads):
    """Outputs and input gradients of every rank."""
    with lt.LocalTensorMode(world):
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        x = _each(world, lambda r: inputs[r].clone()).requires_grad_()
        y = pair(x, Axis.of(mesh))
        y.backward(_each(world, lambda r: grads[r].clone()))
    return [[t._local_tensors[r] for r in range(world)] for t in (y.detach(), x.grad)]


def _random(world, *shape, same=False):
    one = torch.randn(*shape, dtype=torch.float64)
    return [one.clone() if same else torch.randn(*shape, dtype=torch.float64) for _ in range(world)]


def _shards(x, world):
    """[B, S, H] -> per rank [B, s, H], zero rows at the end."""
    s = comm.padded(x.shape[1], world) // world
    whole = torch.cat([x, x.new_zeros(B, s * world - x.shape[1], H)], 1)
    return list(whole.split(s, 1))


def _equal(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 4, 7, 12])
def test_scatter_allgather(world, length):
    x = _random(world, B, length, H, same=True)
    s = comm.padded(length, world) // world
    dy = _random(world, B, s, H)
    y, dx = _run(world, pairs.scatter_allgather, x, dy)
    _equal(y, _shards(x[0], world))
    _equal(dx, [torch.cat(dy, 1)[:, :length]] * world)


@pytest.mark.parametrize("length", [1, 4, 7, 12])
def test_allgather_scatter(world, length):
    s = comm.padded(length, world) // world
    x = _random(world, B, s, H)
    dy = _random(world, B, length, H, same=True)
    y, dx = _run(world, lambda t, a: pairs.allgather_scatter(t, length, a), x, dy)
    _equal(y, [torch.cat(x, 1)[:, :length]] * world)
    _equal(dx, _shards(dy[0], world))


@pytest.mark.parametrize("length", [1, 4, 7, 12])
def test_allgather_reducescatter(world, length):
    s = comm.padded(length, world) // world
    x = _random(world, B, s, H)
    dy = _random(world, B, length, H)
    y, dx = _run(world, lambda t, a: pairs.allgather_reducescatter(t, length, a), x, dy)
    _equal(y, [torch.cat(x, 1)[:, :length]] * world)
    _equal(dx, _shards(sum(dy), world))


@pytest.mark.parametrize("length", [1, 4, 7, 12])
def test_reducescatter_allgather(world, length):
    x = _random(world, B, length, H)
    s = comm.padded(length, world) // world
    dy = _random(world, B, s, H)
    y, dx = _run(world, pairs.reducescatter_allgather, x, dy)
    _equal(y, _shards(sum(x), world))
    _equal(dx, [torch.cat(dy, 1)[:, :length]] * world)


def test_identity_allreduce(world):
    x, dy = _random(world, 5, same=True), _random(world, 5)
    y, dx = _run(world, pairs.identity_allreduce, x, dy)
    _equal(y, x)
    _equal(dx, [sum(dy)] * world)


def test_allreduce_identity(world):
    x, dy = _random(world, 5), _random(world, 5, same=True)
    y, dx = _run(world, pairs.allreduce_identity, x, dy)
    _equal(y, [sum(x)] * world)
    _equal(dx, dy)


def test_reducescatter_allgather_is_its_own_adjoint():
    """<f(x), y> = <x, f*(y)> over all ranks."""
    n, length = 3, 7
    with fake_world(n):
        x = _random(n, B, length, H)
        dy = _random(n, B, comm.padded(length, n) // n, H)
        y, dx = _run(n, pairs.reducescatter_allgather, x, dy)
        left = sum((a * b).sum() for a, b in zip(y, dy, strict=True))
        right = sum((a * b).sum() for a, b in zip(x, dx, strict=True))
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert not dist.is_initialized()
