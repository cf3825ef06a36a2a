"""``layer.compile(fullgraph=True)`` after ``parallelize``: one graph a layer, eager's gradients.

What a compiled layer keeps for backward is the shard, not what was gathered from it.
"""

from __future__ import annotations

import pytest
import torch
from harness import tiny
from harness.parity import Case
from harness.pool import pool
from harness.report import assert_parity

from hf_sp import parallelize
from hf_sp.estimate.simulate import fake_world
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
    shapes = [tuple(x.shape) for x in saved(compiled)]
    assert (1, 15, 64) in shapes
    assert not [shape for shape in shapes if 60 in shape and 64 in shape], shapes


def test_no_more_bytes_than_eager():
    eager, compiled = (
        sum(x.untyped_storage().nbytes() for x in saved(compiled)) for compiled in (False, True)
    )
    assert compiled <= eager, (compiled, eager)
