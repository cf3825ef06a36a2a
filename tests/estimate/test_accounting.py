"""The accounting of a step: each rule by a case small enough to count by hand."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from hf_sp.estimate import (
    CollectiveCount,
    StepAccounting,
    count_step,
    fake_tensors,
    fake_world,
)

# One float32 matrix of 4 x 4, the unit of the small cases.
M = 64


@pytest.fixture(autouse=True)
def _leaves_no_process_group():
    assert not dist.is_initialized()
    yield
    assert not dist.is_initialized()


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    """Run the case on real tensors and on fake ones: the counts are the same."""
    with fake_tensors(torch.float32) if request.param == "fake" else nullcontext():
        yield


def matrix() -> Tensor:
    return torch.ones(4, 4, requires_grad=True)


# ------------------------------------------------------------------------------- storages


@pytest.mark.usefixtures("tensors")
def test_what_the_graph_saves_is_alive_and_what_it_does_not_is_freed():
    x = matrix()
    with StepAccounting() as accounting:
        y = x * 2  # keeps nothing but y, which the next op saves
        z = y * y  # saves y once, though it needs it twice
        del y
        assert accounting.live_bytes == 2 * M
        w = z + 1  # saves nothing: z dies here
        del z
        assert accounting.live_bytes == 2 * M
        assert [s.op for s in accounting.alive()] == ["aten.mul.Tensor", "aten.add.Tensor"]
    del w
    assert accounting.live_bytes == 0
    assert accounting.alive() == []


@pytest.mark.usefixtures("tensors")
def test_a_python_reference_keeps_a_tensor_alive_without_any_graph():
    cache = []
    with StepAccounting() as accounting, torch.no_grad():
        cache.append(matrix() + 1)
        assert accounting.live_bytes == M
        cache.clear()
        assert accounting.live_bytes == 0


@pytest.mark.usefixtures("tensors")
def test_a_view_costs_its_whole_base_and_no_more():
    x = matrix()
    with StepAccounting() as accounting, torch.no_grad():
        y = x * 2
        views = [y.t(), y[:1], y.view(16), y.detach(), y.unsqueeze(0).expand(8, 4, 4)]
        assert accounting.live_bytes == M
        del y
        assert accounting.live_bytes == M
        del views[1:], views[0]
        assert accounting.live_bytes == 0


@pytest.mark.usefixtures("tensors")
def test_in_place_and_out_results_are_not_new():
    x = matrix()
    with StepAccounting() as accounting, torch.no_grad():
        y = x * 2
        y.add_(1)
        torch.mul(x, x, out=y)
        y[:2].zero_()
        assert accounting.live_bytes == M
        y.resize_(8, 8)
        assert accounting.live_bytes == 4 * M


@pytest.mark.usefixtures("tensors")
def test_what_was_there_before_is_not_counted():
    x, buffer = matrix(), torch.zeros(4, 4)
    with StepAccounting() as accounting:
        view = x.t()
        buffer.copy_(x.detach())
        assert accounting.live_bytes == 0
        assert accounting.peak_bytes == 0
    del view


@pytest.mark.usefixtures("tensors")
def test_tensors_made_from_python_numbers_are_counted_and_meta_tensors_are_not():
    with StepAccounting() as accounting:
        made = torch.tensor([1.0, 2.0])
        meta = torch.empty(1024, 1024, device="meta")
        assert accounting.live_bytes == 8
    del made, meta


@pytest.mark.usefixtures("tensors")
def test_the_peak_of_a_known_sequence():
    x = matrix()

    def forward() -> Tensor:
        y = x.exp()  # saved
        z = y + 1  # alive beside y while its sum is taken, then dropped
        return z.sum()

    count = count_step(forward)
    # y and the sum; the sum of 4 bytes was made while z was alive.
    assert count.alive_bytes == M + 4
    # Backward: y, loss, its gradient (4 each) and y * grad = x.grad, which is the peak at
    # 2M + 8; forward: y, z and the loss, 2M + 4.
    assert count.peak_bytes == 2 * M + 8
    assert count.collectives == {}


def test_what_checkpointing_frees_is_not_alive_and_runs_again_in_the_backward():
    def block(x: Tensor) -> Tensor:
        return all_reduce(x).sin().sin().sin()

    with fake_world(2):
        x = matrix()
        plain = count_step(lambda: block(x).square().sum())
        x = matrix()
        again = count_step(lambda: checkpoint(block, x, use_reentrant=False).square().sum())
    # Every op but the all-reduce saves its input; checkpointing keeps what comes out of the block.
    assert plain.alive_bytes == 4 * M + 4
    assert again.alive_bytes == M + 4
    assert plain.forward == again.forward == {"all_reduce": CollectiveCount(1, M)}
    assert plain.backward == {}
    assert again.backward == {"all_reduce": CollectiveCount(1, M)}


# ------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("fake", [False, True])
def test_a_dtensor_counts_as_its_local_tensor(fake):
    with fake_world(4) as mesh, fake_tensors(torch.float32) if fake else nullcontext():
        x = DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)], run_check=False)
        with StepAccounting() as accounting, torch.no_grad():
            y = x * 2
            assert y.shape == (16, 4)
            assert accounting.live_bytes == M
            z = x.redistribute(mesh, [Replicate()]).to_local()
            assert accounting.live_bytes == M + 4 * M
        assert accounting.collectives("forward") == {"all_gather": CollectiveCount(1, 4 * M)}
        del y, z
        assert accounting.live_bytes == 0


def test_a_collective_inside_a_dtensor_op_is_counted_and_so_is_what_it_makes():
    with fake_world(4) as mesh:
        x = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False)
        with StepAccounting() as accounting, torch.no_grad():
            y = x.relu()  # of a sum that is not taken yet: all-reduces first
        assert accounting.collectives("forward") == {"all_reduce": CollectiveCount(1, M)}
        assert (accounting.live_bytes, accounting.peak_bytes) == (M, 2 * M)
        del y


def test_a_collective_in_flight_counts_once_and_stays_once_waited_for():
    with fake_world(4) as mesh:
        x = DTensor.from_local(torch.ones(4, 4), mesh, [Shard(0)], run_check=False)
        with StepAccounting() as accounting, torch.no_grad():
            pending = x.redistribute(mesh, [Replicate()], async_op=True).to_local()
            assert type(pending).__name__ == "AsyncCollectiveTensor"
            assert accounting.live_bytes == 4 * M
            view = pending.view(-1)
            assert accounting.live_bytes == 4 * M
            out = view * 2
            assert accounting.live_bytes == 8 * M
        del pending, view, out
        assert accounting.live_bytes == 0


@pytest.mark.parametrize("fake", [False, True])
def test_what_dtensor_runs_to_learn_a_shape_is_not_counted(fake):
    # An odd size that nothing else in this process has met: the first run asks for its shape.
    size = 1009 + fake
    with fake_world(8) as mesh, fake_tensors(torch.float32) if fake else nullcontext():
        x = distribute_tensor(torch.ones(8, size), mesh, [Shard(0)], src_data_rank=None)
        peaks = []
        for _ in range(2):
            with StepAccounting() as accounting:
                x.exp()
            peaks.append(accounting.peak_bytes)
        assert peaks == [4 * size, 4 * size]


# ---------------------------------------------------------------------------- collectives


def all_reduce(x: Tensor) -> Tensor:
    class Reduce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            name = dist.group.WORLD.group_name
            return wait(torch.ops._c10d_functional.all_reduce(x, "sum", name))

        @staticmethod
        def backward(ctx, grad):
            return grad

    return Reduce.apply(x)


def wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)


@pytest.mark.parametrize("fake", [False, True])
def test_functional_collectives_are_counted_by_their_full_buffer(fake):
    with fake_world(4), fake_tensors(torch.float32) if fake else nullcontext():
        ops, name = torch.ops._c10d_functional, dist.group.WORLD.group_name
        x = torch.ones(4, 4)
        with StepAccounting() as accounting:
            gathered = wait(ops.all_gather_into_tensor(x, 4, name))
            # The fake kernel of wait_tensor makes a second buffer; no rank has it.
            assert accounting.live_bytes == accounting.peak_bytes == 4 * M
            wait(ops.reduce_scatter_tensor(gathered, "sum", 4, name))
            wait(ops.all_reduce(x, "sum", name))
            wait(ops.all_to_all_single(x, [1] * 4, [1] * 4, name))
            wait(ops.broadcast(x, 0, name))
            for pending in ops.all_gather_into_tensor_coalesced([x, x], 4, name):
                wait(pending)
            del pending
            assert accounting.live_bytes == 4 * M
        assert accounting.collectives("backward") == {}
        assert accounting.collectives("forward") == {
            "all_gather": CollectiveCount(2, 4 * M + 8 * M),
            "reduce_scatter": CollectiveCount(1, 4 * M),
            "all_reduce": CollectiveCount(1, M),
            "all_to_all": CollectiveCount(1, M),
            "broadcast": CollectiveCount(1, M),
        }


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch 2.13 renames two of them
@pytest.mark.parametrize("backend", ["fake", "gloo"])
def test_c10d_collectives_are_counted_by_their_full_buffer(backend):
    world = 4 if backend == "fake" else 1
    if backend == "gloo":
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with fake_world(4) if backend == "fake" else nullcontext():
            x, full = torch.ones(4, 4), torch.ones(4 * world, 4)
            with StepAccounting() as accounting:
                dist.all_gather_into_tensor(full, x)
                dist.all_gather(list(full.chunk(world)), x)
                dist.reduce_scatter_tensor(x, full)
                dist.all_reduce(x, async_op=True).wait()
                dist.all_to_all_single(full, full.clone())
                dist.broadcast(x, src=0)
                dist.barrier()
        assert accounting.collectives("forward") == {
            "all_gather": CollectiveCount(2, 2 * world * M),
            "reduce_scatter": CollectiveCount(1, world * M),
            "all_reduce": CollectiveCount(1, M),
            "all_to_all": CollectiveCount(1, world * M),
            "broadcast": CollectiveCount(1, M),
        }
    finally:
        if backend == "gloo":
            dist.destroy_process_group()
