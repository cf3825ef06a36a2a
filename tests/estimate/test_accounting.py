"""The accounting of a step: each rule by a case to count by hand, then whole layers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from hf_sp.errors import ConfigError
from hf_sp.estimate import (
    CollectiveCount,
    StepAccounting,
    StepCount,
    count_step,
    fake_tensors,
    fake_world,
    per_layer,
    sp_gathered_bytes_per_token,
    sp_shard_bytes_per_token,
    tp_bytes_per_token,
)
from scripts.bench.step_cost import (
    LAYOUTS,
    SHAPES,
    count_layer,
    dtensor_sp,
    hf_native,
    make_config,
    unsharded,
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
        return all_reduce(x.sin().sin().sin())

    with fake_world(2):
        x = matrix()
        plain = count_step(lambda: block(x).square().sum())
        x = matrix()
        again = count_step(lambda: checkpoint(block, x, use_reentrant=False).square().sum())
    # sin saves its input (two of which the step made), square the reduced tensor.
    assert plain.alive_bytes == 3 * M + 4
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


# ---------------------------------------------------------------------------------- steps


def test_per_layer_is_the_difference_shared_out():
    one = StepCount(10, 20, {"all_reduce": CollectiveCount(1, 4)}, {})
    three = StepCount(
        30, 60, {"all_reduce": CollectiveCount(5, 12)}, {"all_gather": CollectiveCount(2, 8)}
    )
    layer = per_layer(one, three, 2)
    assert (layer.alive_bytes, layer.peak_bytes) == (10, 20)
    assert layer.collectives == {
        "all_reduce": CollectiveCount(2, 4),
        "all_gather": CollectiveCount(1, 4),
    }
    assert (layer.payload_bytes, layer.wire_bytes) == (8, 12)
    with pytest.raises(ConfigError, match="do not cost the same"):
        per_layer(one, three, 3)
    with pytest.raises(ConfigError, match="layers=0"):
        per_layer(one, three, 0)


def test_refusals_leave_nothing_behind():
    with pytest.raises(ConfigError, match="returned float"):
        count_step(lambda: 1.0)
    with pytest.raises(ConfigError, match="requires_grad=False"):
        count_step(lambda: torch.ones(()))
    with pytest.raises(ConfigError, match="rank=2"), fake_world(2, rank=2):
        pass
    with fake_world(2), pytest.raises(ConfigError, match="fake, 2 ranks"), fake_world(4):
        pass
    with pytest.raises(KeyError), fake_world(2), fake_tensors(torch.float16):
        raise KeyError
    assert torch.get_default_dtype() == torch.float32


# --------------------------------------------------------------------------------- layers

# The small shape: h = 512, f = 1792, 8 heads of 64, C = (4*512 + 4*512 + 4*8)/t = 4128/t.
# HF's native TP keeps 16h + 8 + C + 8f/t, torch's DTensor TP + SP 4h + (12h + 8)/t + C + 8f/t,
# Megatron's and hf_sp's SP (16h + 8)/t + C + 8f/t.
SMALL = SHAPES["small"]
SEQ = 128


@pytest.mark.parametrize(
    ("layout", "formula", "tp", "expected"),
    [
        ("unsharded", None, 2, 26664),
        ("HF native TP", tp_bytes_per_token, 2, 17432),
        ("HF native TP", tp_bytes_per_token, 4, 12816),
        ("DTensor TP+SP", sp_gathered_bytes_per_token, 2, 14356),
        ("DTensor TP+SP", sp_gathered_bytes_per_token, 4, 8202),
        ("hf_sp sp=False", tp_bytes_per_token, 2, 17432),
        ("hf_sp sp=False", tp_bytes_per_token, 4, 12816),
        ("hf_sp sp=True", sp_shard_bytes_per_token, 2, 13332),
        ("hf_sp sp=True", sp_shard_bytes_per_token, 4, 6666),
    ],
)
def test_bytes_a_layer_keeps_per_token(layout, formula, tp, expected):
    layer, _ = count_layer(SMALL, tp, SEQ, LAYOUTS[layout][0])
    assert layer.alive_bytes == expected * SEQ
    if formula is not None:
        assert formula(SMALL, tp) == expected


@pytest.mark.parametrize(
    ("layout", "forward", "backward"),
    [
        ("HF native TP", {"all_reduce": 2}, {"all_reduce": 5}),
        (
            "DTensor TP+SP",
            {"all_gather": 2, "reduce_scatter": 2},
            {"all_gather": 2, "reduce_scatter": 2},
        ),
        ("hf_sp sp=False", {"all_reduce": 2}, {"all_reduce": 2}),
        (
            "hf_sp sp=True",
            {"all_gather": 2, "reduce_scatter": 2},
            {"all_gather": 4, "reduce_scatter": 2},
        ),
    ],
)
def test_collectives_of_a_layer(layout, forward, backward):
    layer, _ = count_layer(SMALL, 2, SEQ, LAYOUTS[layout][0])
    hidden = SEQ * SMALL.hidden * 2  # [S, H] in bfloat16: what each of them carries

    def carrying(counts):
        # hf_sp's two norm weights have a small all-reduce each beside these.
        big = {k: c for k, c in counts.items() if c.bytes >= c.calls * hidden}
        small = {k: c for k, c in counts.items() if k not in big}
        assert all(c.bytes == c.calls * SMALL.hidden * 2 for c in small.values())
        assert all(c.bytes == c.calls * hidden for c in big.values())
        return {k: c.calls for k, c in big.items()}

    assert carrying(layer.forward) == forward
    assert carrying(layer.backward) == backward


@pytest.mark.parametrize("layout", [unsharded, hf_native, dtensor_sp])
def test_fake_tensors_cost_what_real_ones_do(layout):
    def count(context) -> StepCount:
        torch.manual_seed(0)
        with fake_world(2) as mesh:
            apply = layout(mesh)
            with context:
                model: nn.Module = LlamaForCausalLM(make_config(SMALL, SEQ, layers=1))
                model = apply(model)
                ids = torch.zeros(1, SEQ, dtype=torch.long)
                return count_step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)

    assert count(nullcontext()) == count(fake_tensors(torch.float32))
