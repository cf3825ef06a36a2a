"""The order in which a block's backward launches collectives, and what it computes beside them.

One communicator carries its collectives out in the order of their launch, each beside what is
computed until it is waited for. The order is that of the dispatched operations, so that it holds
without a GPU: in a fake world, with launches and waits as on a GPU (on a CPU each collective is
waited for at once).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from harness import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sp import parallelize
from hf_sp.comm import collectives as comm
from hf_sp.estimate.simulate import fake_world
from hf_sp.model import columns
from hf_sp.torch_private import collective_ops

PRODUCTS = ("mm", "addmm", "addmm_", "bmm")
LAUNCHES = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
}


@dataclass
class Event:
    """One operation: a launch, a wait for one, or a product."""

    kind: str
    what: str
    buffer: int = 0


class Trace(TorchDispatchMode):
    """Launches, waits and products, in order."""

    def __init__(self):
        super().__init__()
        self.events: list[Event] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__
        if name in LAUNCHES:
            self.events.append(Event("launch", LAUNCHES[name], result.data_ptr()))
        elif name == "wait_tensor":
            self.events.append(Event("wait", "", args[0].data_ptr()))
        elif name in PRODUCTS and min(args[-1].shape) > 0:
            self.events.append(Event("product", name))
        return result

    def flights(self, kind):
        """(place of the launch, products until it is waited for) of each collective of a kind."""
        found = []
        for start, event in enumerate(self.events):
            if event.kind != "launch" or event.what != kind:
                continue
            beside = 0
            for later in self.events[start + 1 :]:
                if later.kind == "wait" and later.buffer == event.buffer:
                    break
                beside += later.kind == "product"
            else:
                pytest.fail(f"{kind} at {start} is never waited for")
            found.append((start, beside))
        return found


@contextlib.contextmanager
def as_on_a_gpu():
    """Collectives in flight until they are waited for."""

    def launch(op, x, *args):
        return op(x, *args)

    with (
        mock.patch.object(comm, "_launch", launch),
        mock.patch.object(comm, "wait", collective_ops.wait_tensor.default),
    ):
        yield


def backward_of(family, tp=2, adapters=False, layers=1, **options):
    """The trace of one training step's backward."""
    with fake_world(tp) as mesh, as_on_a_gpu():
        model = tiny.build(family, torch.float32, 0, "eager", num_hidden_layers=layers).train()
        model = parallelize(model, mesh=mesh, **options)
        if adapters:
            from peft import LoraConfig, get_peft_model

            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
        ids = torch.arange(16).view(1, 16)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        trace = Trace()
        with trace:
            loss.backward()
        return trace


def check_dense(trace):
    # Of the two exits, and of the two entries.
    gathers, scatters = trace.flights("all_gather"), trace.flights("reduce_scatter")
    # An entry launches its gather, the input gradients run beside it, then its reduce-scatter,
    # beside which the weight gradients run.
    entries = [(g, s) for g in gathers for s in scatters if g[1] and _next(trace, g[0]) == s[0]]
    assert len(entries) == 2, trace.events
    # gate, up / q, k, v: a product each beside the gather, and a weight gradient each beside the
    # reduce-scatter.
    assert [gather[1] for gather, _ in entries] == [2, 3]
    assert [scatter[1] for _, scatter in entries] == [2, 3]


def _next(trace, start):
    places = [i for i, e in enumerate(trace.events) if e.kind == "launch" and i > start]
    return places[0] if places else None


def test_dense_block():
    check_dense(backward_of("llama"))


def check_norms(trace):
    """The sums of the layers' norms, in backward order: the first layer's comes last."""
    *later, first = trace.flights("all_reduce")[-3:]
    assert len(later) == 2, trace.events
    # A layer's is waited for when the one before it is done: 2 products for each of 7 linears, and
    # 4 of eager attention.
    assert [beside for _, beside in later] == [18, 18]
    assert first[1] == 0


def test_sum_of_norms():
    check_norms(backward_of("llama", layers=3))


def test_a_sum_that_is_waited_for_on_the_spot_is_noticed():
    with _waits_at_launch("launch_all_reduce_"), pytest.raises(AssertionError):
        check_norms(backward_of("llama", layers=3))


def check_lora(trace):
    """Nothing reads x again: one reduce-scatter a block, of dx and du together, and no gather."""
    scatters = trace.flights("reduce_scatter")
    # The first layer's attention needs no gradient of its input, but its factors do.
    assert len(scatters) == 2
    # The exits' gathers of dy are all there are.
    assert len(trace.flights("all_gather")) == 2


def test_lora_block():
    check_lora(backward_of("llama", adapters=True))


def check_sparse(trace):
    """Experts split by features: the router's input gradient beside the gather of x, the router's
    and the experts' weight gradients beside the reduce-scatter."""
    scatters, gathers = trace.flights("reduce_scatter"), trace.flights("all_gather")
    # The sparse block's entry comes before the attention's.
    start, beside = scatters[0]
    assert beside >= 2, trace.events
    before = [g for g in gathers if g[0] < start and _next(trace, g[0]) == start]
    assert before, trace.events
    assert before[0][1] >= 1, trace.events


def test_sparse_block():
    check_sparse(backward_of("mixtral"))


def check_whole_experts(trace):
    """The tokens' rows travel again beside the input gradients, dx beside the weight gradients."""
    flights = trace.flights("all_to_all")
    # dy, the tokens again, d scale, dx.
    assert len(flights) == 4, trace.events
    _, again, _, dx = (beside for _, beside in flights)
    assert again >= 1, trace.events
    assert dx >= 1, trace.events


def test_whole_experts():
    check_whole_experts(backward_of("mixtral", ep=2))


def _waits_at_launch(name):
    right = getattr(comm, name)
    return mock.patch.object(comm, name, lambda *args: comm.wait(right(*args)))


@pytest.mark.parametrize(
    ("check", "family", "options", "name"),
    [
        (check_dense, "llama", {}, "launch_reduce_scatter"),
        (check_dense, "llama", {}, "launch_all_gather"),
        (check_sparse, "mixtral", {}, "launch_reduce_scatter"),
        (check_sparse, "mixtral", {}, "launch_all_gather"),
        (check_whole_experts, "mixtral", {"ep": 2}, "launch_all_to_all"),
    ],
)
def test_an_order_without_overlap_is_noticed(check, family, options, name):
    with _waits_at_launch(name), pytest.raises(AssertionError):
        check(backward_of(family, **options))


def test_a_gather_that_a_lora_block_does_not_need_is_noticed():
    real = comm.launch_reduce_scatter

    def scatter(x, axis):
        comm.wait(comm.launch_all_gather(x[: x.shape[0] // axis.size], axis))
        return real(x, axis)

    patch = mock.patch.object(comm, "launch_reduce_scatter", scatter)
    with patch, pytest.raises(AssertionError):
        check_lora(backward_of("llama", adapters=True))


@pytest.mark.parametrize(("check", "family"), [(check_dense, "llama"), (check_sparse, "mixtral")])
def test_a_gather_behind_the_reduce_scatter_is_noticed(check, family):
    """What the first version did: launched together, but in the other order."""
    right = columns._gather_again
    waiting = []

    def later(x, axis, grads):
        waiting.append((x, axis, grads))
        return x.new_empty(x.shape[0] * axis.size, *x.shape[1:])

    def scatter(partial, axis):
        launched = real(partial, axis)
        if waiting:
            right(*waiting.pop())
        return launched

    real = comm.launch_reduce_scatter
    with (
        mock.patch.object(columns, "_gather_again", later),
        mock.patch.object(comm, "launch_reduce_scatter", scatter),
        pytest.raises((AssertionError, pytest.fail.Exception)),
    ):
        check(backward_of(family))
