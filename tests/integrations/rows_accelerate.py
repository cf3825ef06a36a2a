"""What goes wrong without each patch of accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from hf_sp.checkpoint.optimizer import OPTIMIZER_DIRECTORY
from hf_sp.checkpoint.shards import Shards
from integrations.data import collate, even_rows
from integrations.rows import PerRank, Raises, row
from integrations.scene import logits_made, reset_accelerate


def _loader(rows=8, **options):
    return DataLoader(even_rows(rows), batch_size=2, collate_fn=collate, **options)


@row(
    "ParallelismConfig._validate_accelerator",
    right=[2, 1],
    wrong=Raises("ValueError", "ParallelismConfig"),
)
def processes_on_cpu(scene):
    """Before the model is known, and then."""
    accelerator = Accelerator(parallelism_config=ParallelismConfig(tp_size=2))
    before = accelerator.num_processes
    accelerator.prepare(scene.tiny())
    return [before, accelerator.num_processes]


# The loader comes first, as in most scripts.
@row("Accelerator.prepare", right=4, wrong=Raises("ConfigError", "prepared before"))
def batches_of_a_loader_before_the_model(scene):
    loader, _ = Accelerator().prepare(_loader(), scene.tiny())
    return len(loader)


# DDP, into which the model goes otherwise, flattens DTensors; accelerate compiles the whole model.
@row(
    "Accelerator.prepare_model",
    right=["LlamaForCausalLM", "LlamaForCausalLM", 2],
    wrong=["RuntimeError: Cannot flatten unevenly sharde"] * 2 + [0],
)
def prepared_and_compiled(scene):
    def prepared(call):
        try:
            return type(call()).__name__
        except RuntimeError as error:
            return f"RuntimeError: {error}"[:44]

    alone = prepared(lambda: Accelerator().prepare_model(scene.tiny()))
    reset_accelerate()
    plugin = TorchDynamoPlugin(backend=DynamoBackend.AOT_EAGER)
    model = scene.tiny()
    kind = prepared(lambda: Accelerator(dynamo_plugin=plugin).prepare(model))
    layers = [layer._compiled_call_impl is not None for layer in model.model.layers]
    return [alone, kind, sum(layers)]


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
