"""What goes wrong without each patch of accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.data import DataLoader

from hf_sp.checkpoint.optimizer import OPTIMIZER_DIRECTORY
from hf_sp.checkpoint.shards import Shards
from integrations.data import Rows, collate, even_rows
from integrations.rows import PerRank, Raises, row
from integrations.scene import logits_made, reset_accelerate


def _loader(rows=8, **options):
    return DataLoader(even_rows(rows), batch_size=2, collate_fn=collate, **options)


@row(
    "ParallelismConfig._validate_accelerator",
    right=1,
    wrong=Raises("ValueError", "ParallelismConfig"),
)
def step_on_cpu(scene):
    trainer = scene.trainer("probe", max_steps=1)
    trainer.train()
    return trainer.state.global_step


# The loader comes first, as in most scripts.
@row("Accelerator.prepare", right=4, wrong=Raises("ConfigError", "prepared before"))
def batches_of_a_loader_before_the_model(scene):
    loader, _ = Accelerator().prepare(_loader(), scene.tiny())
    return len(loader)


# The model of a user who calls this alone goes into DDP, which flattens DTensors; and after
# ``prepare`` has told of the mesh, accelerate compiles the model as a whole.
@row(
    "Accelerator.prepare_model",
    right=["LlamaForCausalLM", "LlamaForCausalLM", 2],
    wrong=["RuntimeError: Cannot flatten unevenly sharde", "OptimizedModule", 0],
)
def prepared_and_compiled(scene):
    try:
        alone = type(Accelerator().prepare_model(scene.tiny())).__name__
    except RuntimeError as error:
        alone = f"RuntimeError: {error}"[:44]
    reset_accelerate()
    plugin = TorchDynamoPlugin(backend=DynamoBackend.AOT_EAGER)
    model = scene.tiny()
    prepared = Accelerator(dynamo_plugin=plugin).prepare(model)
    layers = [layer._compiled_call_impl is not None for layer in model.model.layers]
    return [alone, type(prepared).__name__, sum(layers)]


# Parameters of the model, two of which are empty on a rank.
@row("Accelerator._prepare_tp", right=23, wrong=PerRank(23, 22))
def parameters_of_the_optimizer(scene):
    model = scene.tiny()
    accelerator = scene.trainer("probe", model).accelerator
    for name in ("a", "b"):
        one = distribute_tensor(
            torch.ones(1, 3), model.lm_head.weight.device_mesh, [Shard(0)], src_data_rank=None
        )
        model.register_parameter(name, nn.Parameter(one))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    return len({id(p) for g in optimizer.param_groups for p in g["params"]})


@row("ConvertOutputsToFp32.__call__", right=0, wrong=2)
def whole_logits_of_a_bf16_step(scene):
    trainer = scene.trainer("probe", scene.tiny(dtype=torch.float32), bf16=True, max_steps=1)
    with logits_made() as made:
        trainer.train()
    return len(made)


# Kinds of orders that the ranks shuffle to.
@row("Accelerator.prepare_data_loader", right=1, wrong=2)
def orders_of_the_ranks(scene):
    accelerator = Accelerator()
    model = scene.tiny()
    torch.manual_seed(77 + scene.rank)
    _, loader = accelerator.prepare(model, _loader(shuffle=True))
    order = [batch["input_ids"].tolist() for batch in loader]
    return len({str(one) for one in scene.everywhere(order)})


@row("DataLoaderDispatcher.__len__", right=4, wrong=2)
def length_of_a_dispatched_loader(scene):
    options = {"accelerator_config": {"dispatch_batches": True}}
    trainer = scene.trainer("probe", train_dataset=even_rows(8), **options)
    return len(trainer.get_train_dataloader())


# accelerate drops one of the last batch alone.
@row("Accelerator.gather_for_metrics", right=7, wrong=13)
def rows_of_an_evaluation(scene):
    accelerator = Accelerator()
    test = DataLoader(Rows(7, seed=8), batch_size=2, collate_fn=collate)
    _, test = accelerator.prepare(scene.tiny(), test)
    return sum(len(accelerator.gather_for_metrics(b["input_ids"][:, 0])) for b in test)


# Whole tensors for the main process.
@row("Accelerator.get_state_dict", right=PerRank([21, 0], [0, 0]), wrong=[21, 21])
def whole_state_dict(scene):
    accelerator = Accelerator()
    model = accelerator.prepare(scene.tiny())
    state = accelerator.get_state_dict(model)
    return [len(state), sum(isinstance(value, DTensor) for value in state.values())]


def _stepped(scene):
    accelerator = Accelerator()
    model = scene.tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * (scene.rank + 1)
    optimizer.step()
    return accelerator, model, optimizer


# Rows of the embedding's moments that are saved for all ranks, of 61.
@row("Accelerator.save_state", right=61, wrong=31)
def rows_of_the_saved_moments(scene):
    accelerator, *_ = _stepped(scene)
    folder = scene.fresh("state")
    accelerator.save_state(str(folder))
    scene.everywhere(None)
    if (folder / OPTIMIZER_DIRECTORY).is_dir():
        shapes = Shards(folder / OPTIMIZER_DIRECTORY).shapes
        return shapes["model.embed_tokens.weight.exp_avg"][0]
    saved = torch.load(folder / "optimizer.bin", weights_only=False)
    moment = saved["state"][0]["exp_avg"]
    return len(moment.to_local() if isinstance(moment, DTensor) else moment)


@row("Accelerator.load_state", right=21, wrong=Raises("RuntimeError", "invalid python storage"))
def state_into_shards(scene):
    accelerator, _, optimizer = _stepped(scene)
    folder = scene.fresh("state")
    accelerator.save_state(str(folder))
    optimizer.state.clear()
    accelerator.load_state(str(folder))
    return len(optimizer.state)


@row("AcceleratedScheduler.step", right=1, wrong=2)
def steps_of_a_schedule(scene):
    accelerator = Accelerator()
    model = scene.tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    optimizer.step()
    schedule.step()
    return schedule.scheduler.last_epoch
