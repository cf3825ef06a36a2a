"""The cost of a training step, counted and not timed.

`count_step` runs one forward and backward; with `fake_world` and `fake_tensors` it does so for one
rank of any world, in seconds and without memory::

    with fake_world(8) as mesh, fake_tensors(torch.bfloat16):
        model = parallelize(LlamaForCausalLM(config), mesh=mesh)
        cost = count_step(lambda: model(input_ids=ids, labels=ids).loss)

It is the training code itself that runs, so the estimate can't drift from it.
"""

from hf_sp.estimate.accounting import CollectiveCount, CollectiveRecord, LiveStorage, StepAccounting
from hf_sp.estimate.simulate import fake_tensors, fake_world
from hf_sp.estimate.step import StepCount, count_step, per_layer
from hf_sp.estimate.training import Kinds, TrainingCount, count_training

__all__ = [
    "CollectiveCount",
    "CollectiveRecord",
    "Kinds",
    "LiveStorage",
    "StepAccounting",
    "StepCount",
    "TrainingCount",
    "count_step",
    "count_training",
    "fake_tensors",
    "fake_world",
    "per_layer",
]
