"""Jobs: ranks that part company, under Trainer and in training loops."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from integrations.data import even_rows
from integrations.scene import refused


class _Asks(TrainerCallback):
    """Sets a flag of Trainer's at one event of one step, on one rank."""

    def __init__(self, here, event, flag):
        if here:
            setattr(self, event, lambda *args, **kwargs: self.ask(*args))
        self.flag = flag

    def ask(self, args, state, control):
        if state.global_step >= 2:
            setattr(control, self.flag, True)


def lone_wishes(scene):
    """Steps done, checkpoints and evaluations, where one rank alone asks for something."""
    report = {}
    for flag, event in (
        ("should_training_stop", "on_step_end"),
        ("should_training_stop", "on_substep_end"),
        ("should_training_stop", "on_log"),
        ("should_epoch_stop", "on_step_end"),
        ("should_save", "on_log"),
        ("should_evaluate", "on_step_end"),
    ):
        for rank in (0, 1):
            name = f"{flag}-{event}-{rank}"
            folder = scene.fresh(name)
            options = {"train_dataset": even_rows(20), "max_steps": 4, "output_dir": str(folder)}
            trainer = scene.trainer("lone", **options)
            trainer.add_callback(_Asks(scene.rank == rank, event, flag))
            trainer.train()
            evaluated = [r["step"] for r in trainer.state.log_history if "eval_loss" in r]
            saved = sorted(p.name for p in folder.iterdir())
            report[name] = [trainer.state.global_step, saved, evaluated]
    return report


def lone_arguments(scene):
    """The refusals of a Trainer whose arguments differ on the second rank."""
    model = scene.tiny()
    values = {
        "learning_rate": (1e-3, 1e-4),
        "max_grad_norm": (1.0, 0.5),
        "gradient_accumulation_steps": (1, 2),
        "seed": (1, 2),
        "save_steps": (5, 6),
        "optim": ("sgd", "adamw_torch"),
    }
    report = {
        name: refused(lambda n=name, v=pair: scene.trainer("lone", model, **{n: v[scene.rank]}))
        for name, pair in values.items()
    }
    lone = {"use_liger_kernel": scene.rank == 1}
    report["refused"] = refused(lambda: scene.trainer("lone", model, **lone))
    kept = {"lr_scheduler_kwargs": {"f": lambda x: x}, "run_name": str(scene.rank)}
    report["own"] = refused(lambda: scene.trainer("lone", model, **kept))
    return report


def timeouts(scene):
    """Seconds that collectives of the model's groups and of the default one wait for, in turn."""
    # Not at the top: the plain process must not have seen it.
    from hf_sp import parallel_state
    from hf_sp.torch_private import set_timeout

    state = parallel_state(model := scene.tiny())
    groups = [dist.group.WORLD, state.group, state.all_ranks]
    cpu = torch.device("cpu")

    def found():
        return sorted({g._get_backend(cpu).options._timeout.total_seconds() for g in groups})

    before = found()
    try:
        scene.trainer("stock", model)
        report = {"unset": found() == before}
        scene.trainer("short", model, ddp_timeout=77)
        report["set"] = found()
        lone = {"ddp_timeout": 77 + scene.rank}
        report["differing"] = refused(lambda: scene.trainer("lone", model, **lone))
    finally:
        for group in groups:
            set_timeout(group, timedelta(seconds=before[-1]))
    return report


def parted(scene):
    """Refusals of forwards that the ranks do not share, after the first ones."""
    model = scene.tiny(dtype=torch.float32)
    ids = torch.arange(12).view(2, 6)

    def step(ids=ids, train=True, **extra):
        with torch.set_grad_enabled(train):
            model.train(train)(input_ids=ids, labels=ids, **extra)

    for _ in range(10):
        step()
        step(train=False)
    lone = scene.rank == 1
    mask = torch.zeros(2, 1, 6, 6)
    calls = {
        "values": lambda: step(ids + lone),
        "length": lambda: step(ids[:, : 5 + lone]),
        "evaluation": lambda: step(ids + lone, train=False),
        "floats": lambda: step(attention_mask=mask - 1.0 * lone),
        "kinds": lambda: step(train=lone),
        "generate": lambda: step() if lone else model.generate(ids, max_new_tokens=1),
    }
    report = {name: refused(call) for name, call in calls.items()}
    report["same"] = refused(step)
    return report
