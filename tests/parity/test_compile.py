"""``layer.compile(fullgraph=True)`` after ``parallelize``: one graph a layer, eager's gradients.

What a compiled layer keeps for backward is the shard, not what was gathered from it.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from harness import tiny
from harness.parity import Case
from harness.pool import pool
from harness.report import assert_parity

from hf_sp import parallelize
from hf_sp.comm import collectives as comm
from hf_sp.estimate.simulate import fake_world
from hf_sp.model import columns
from hf_sp.model.compile import compile_layers
from parity import compile_jobs

# torch's tracer looks at the attribute of what it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


# Every graph is traced on each rank: many lengths once, other forms of a layer in the two lengths
# that make a second graph.
ONE_LAYER = (("num_hidden_layers", 1),)


@pytest.mark.parametrize(
    ("case", "count"),
    [
        (Case("qwen3", model_kwargs=ONE_LAYER), 4),
        # A norm in float32 inside: HF's own code, which is what a compiled layer runs.
        (Case("llama_bias", model_kwargs=ONE_LAYER), 2),
        (Case("llama_kv1", sp=False, model_kwargs=ONE_LAYER), 2),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_unsharded_model(case, count):
    ranks = pool(2).run(compile_jobs.lengths, case=case, count=count, timeout=280)
    assert_parity([report for report, _ in ranks])
    # Some graphs for these shapes, and not one for each length to come.
    assert all(graphs <= 8 for _, graphs in ranks), ranks


def saved(compiled: bool, length: int = 60, tp: int = 4) -> list[torch.Tensor]:
    """What the decoder saves, each storage once, but for parameters."""
    found: dict[int, torch.Tensor] = {}
    with fake_world(tp) as mesh:
        model = tiny.build("llama", torch.float32, 0, "sdpa", num_hidden_layers=1).train()
        model = parallelize(model, mesh=mesh)
        parameters = {p.to_local().untyped_storage().data_ptr() for p in model.parameters()}
        if compiled:
            torch._dynamo.reset()
            for layer in model.model.layers:
                # The partitioner of inductor decides what is saved.
                layer.compile(fullgraph=True, backend="aot_eager_decomp_partition")
        ids = torch.arange(length).view(1, length) % 50

        def pack(x):
            if x.untyped_storage().data_ptr() not in parameters:
                found[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.model(input_ids=ids, use_cache=False)
    return list(found.values())


@pytest.mark.parametrize("compiled", [False, True])
def test_the_shard_is_saved(compiled):
    """No tensor of all tokens and all features: with plain collectives it would be."""
    found = saved(compiled)
    assert (1, 15, 64) in [tuple(x.shape) for x in found]
    assert whole(found) == []


def whole(tensors):
    """Shapes of all tokens and all features."""
    return [tuple(x.shape) for x in tensors if 60 in x.shape and 64 in x.shape]


def test_a_plain_gather_in_backward_is_noticed():
    """The partitioner takes it for the forward's: the inputs of both blocks are saved."""

    def gather(x, axis, grads):
        return comm.launch_all_gather(x, axis)

    with mock.patch.object(columns, "_gather_again", gather):
        assert len(whole(saved(compiled=True))) == 2


def test_no_more_bytes_than_eager():
    eager, compiled = (
        sum(x.untyped_storage().nbytes() for x in saved(compiled)) for compiled in (False, True)
    )
    assert compiled <= eager, (compiled, eager)


def test_layers_with_experts_stay_eager():
    """As Trainer compiles a model; its dense layers are compiled."""
    with fake_world(2) as mesh:
        model = tiny.build("qwen3_moe", torch.float32, 0, "sdpa").train()
        model = parallelize(model, mesh=mesh)
        torch._dynamo.reset()
        ids = torch.arange(17).view(1, 17)

        def gradients():
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            return {n: p.grad.to_local() for n, p in model.named_parameters()}

        eager = gradients()
        compile_layers(model, backend="aot_eager")
        layers = model.model.layers
        sparse = [hasattr(layer.mlp, "experts") for layer in layers]
        assert set(sparse) == {True, False}
        assert [layer._compiled_call_impl is None for layer in layers] == sparse
        # float32, some operators decomposed
        torch.testing.assert_close(gradients(), eager, rtol=1e-4, atol=1e-6)
