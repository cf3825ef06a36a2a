"""Jobs: training runs, the same in every mode."""

from __future__ import annotations

import contextlib
import os

import torch

from integrations.data import Rows, SizedStream, Stream, even_rows, noisy_collate
from integrations.scene import reset_accelerate, weights


def train(scene):
    trainer = scene.trainer("train", include_num_input_tokens_seen="all", max_steps=4)
    report = scene.train(trainer)
    report["batch_size"] = trainer.get_total_train_batch_size(trainer.args)
    whole = weights(trainer.model)
    if scene.rank == 0:
        torch.save(whole, scene.out / f"{scene.mode}-weights.pt")
    return {"train": report}


def _summed(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


VARIANTS = {
    # One length: compiled layers are not compiled anew.
    "three_steps": {"train_dataset": even_rows(12), "max_steps": 3},
    "tokens_local": {"average_tokens_across_devices": False},
    "no_clipping": {"max_grad_norm": 0.0, "gradient_accumulation_steps": 3},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
    "epochs": {"train": 11, "num_train_epochs": 2, "max_steps": -1},
    "by_length": {"train_sampling_strategy": "group_by_length"},
    "rebalance": {"train_sampling_strategy": "batch_rebalance"},
    "stream": {"train_dataset": Stream(Rows(20))},
    "sized_stream": {
        "train_dataset": SizedStream(Rows(10)),
        "num_train_epochs": 1,
        "max_steps": -1,
    },
    "dispatch": {
        "train_dataset": even_rows(12),
        "num_train_epochs": 1,
        "max_steps": -1,
        "accelerator_config": {"dispatch_batches": True},
    },
    "split": {
        "train_dataset": Stream(even_rows(12)),
        "accelerator_config": {"split_batches": True},
    },
    "noisy": {"collator": noisy_collate},
    "workers": {"collator": noisy_collate, "dataloader_num_workers": 2},
    "plain_sampler": {"accelerator_config": {"use_seedable_sampler": False}},
    "loss_func": {"compute_loss_func": _summed},
    "checkpointing": {"gradient_checkpointing": True},
    "sgd": {"optim": "sgd"},
    "rmsprop": {"optim": "rmsprop", "learning_rate": 1e-3},
    "adagrad": {"optim": "adagrad"},
    "fused": {"optim": "adamw_torch_fused"},
    "auto_find": {"auto_find_batch_size": True},
}


def variants(scene):
    report = {n: scene.train(scene.trainer(n, **options)) for n, options in VARIANTS.items()}
    report["tied"] = scene.train(scene.trainer("tied", scene.tiny(tie=True)))
    made = {"model_init": lambda: scene.tiny(rank_seeds=False)}
    report["model_init"] = scene.train(scene.trainer("model_init", **made))
    low = scene.tiny(dtype=torch.float32)
    report["bf16"] = scene.train(scene.trainer("bf16", low, bf16=True))
    return report


def compiled(scene):
    """``torch_compile=True``, and what was compiled."""
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    with _compiler() as counters:
        trainer = scene.trainer("compiled", **VARIANTS["three_steps"], **options)
        report = scene.train(trainer)
        layers = trainer.model.model.layers
        made = {
            "layers": sum(layer._compiled_call_impl is not None for layer in layers),
            "model": type(trainer.model_wrapped).__name__,
            "graphs": counters["stats"]["unique_graphs"],
            "breaks": sum(counters["graph_break"].values()),
        }
    return {"compiled": report, "made": made}


@contextlib.contextmanager
def _compiler():
    """Trainer tells accelerate of the compiler by the environment, which would outlive it."""
    before = dict(os.environ)
    reset_accelerate()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        yield torch._dynamo.utils.counters
    finally:
        os.environ.clear()
        os.environ.update(before)
        reset_accelerate()
        torch._dynamo.reset()
