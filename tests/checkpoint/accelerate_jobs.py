"""Rank functions: ``Accelerator.save_state`` and ``load_state`` in a loop of one's own."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import nn
from torch.distributed.tensor import DTensor

from checkpoint.jobs import launched, model_of, refused, weights
from hf_sp import parallelize


class Counter:
    """Something registered: a number and a tensor."""

    def __init__(self) -> None:
        self.value: Any = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": torch.arange(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["tensor"], torch.arange(3))
        self.value = state["value"]


class Loop:
    """A model, an optimizer, a schedule and a registered object, as an Accelerator holds them."""

    def __init__(self, kind: str, seed: int, project: Any = None, model: Any = None, **options):
        self.accelerator = Accelerator(project_config=project)
        self.model = model_of(kind, seed, **options) if model is None else model
        # eps: a gradient of noise alone, which Adam would make a step of full size.
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1.0 / (i + 1))
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)
        prepared = self.accelerator.prepare(self.model, optimizer, schedule)
        _, self.optimizer, self.schedule = prepared

    def step(self) -> list[float]:
        """A step on a batch of the generator's; loss, and the rate that it was made with."""
        ids = torch.randint(3, 90, (2, 9))
        loss = self.model(input_ids=ids, labels=ids).loss
        rate = self.schedule.get_last_lr()[0]
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.counter.value += 1
        return [float(loss), rate, random.random(), np.random.rand()]


def seed() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def saves(folder: str, kind: str, **options: Any) -> dict[str, Any]:
    """Two steps, saved, and two more."""
    with launched():
        seed()
        loop = Loop(kind, 0, **options)
        steps = [loop.step(), loop.step()]
        loop.accelerator.save_state(folder)
        steps += [loop.step(), loop.step()]
        return {"steps": steps, "weights": weights(loop.model)}


def loads(folder: str, kind: str, **options: Any) -> dict[str, Any]:
    """The rest, from other weights."""
    with launched():
        loop = Loop(kind, 0 if kind == "lora" else 5, **options)
        loop.accelerator.load_state(folder)
        value = loop.counter.value
        return {
            "steps": [loop.step(), loop.step()],
            "counter": value,
            "weights": weights(loop.model),
        }


def names(folder: Path) -> list[str]:
    dist.barrier()
    return sorted(p.name for p in folder.iterdir())


def automatic(folder: str) -> dict[str, Any]:
    """accelerate's own names, a limit, a last checkpoint that is half, and a number taken."""
    with launched():
        seed()
        settings = {"automatic_checkpoint_naming": True, "total_limit": 2}
        loop = Loop("llama", 0, ProjectConfiguration(folder, **settings))
        steps = []
        for _ in range(3):
            steps.append(loop.step())
            loop.accelerator.save_state()
        run = Path(folder) / "checkpoints"
        found = {"names": names(run), "next": loop.step()}
        if dist.get_rank() == 0:
            (run / "checkpoint_2" / "model.safetensors").unlink()
        dist.barrier()
        loop.accelerator.load_state()
        found["again"], found["wanted"] = loop.step(), steps[2]
        loop.accelerator.project_configuration.iteration = 1
        found["taken"] = refused(loop.accelerator.save_state)
        loop.accelerator.project_configuration.automatic_checkpoint_naming = False
        found["unnamed"] = refused(loop.accelerator.save_state)
        return found


def hooks(folder: str) -> dict[str, Any]:
    """Hooks that save and load the weights in their own way; and two models, one of them tied."""
    with launched():
        seed()
        loop = Loop("llama", 0)
        twin = parallelize(model_of("llama", 1, parallel=False))
        twin.tie_weights()
        loop.accelerator.prepare(twin)

        def save(models, given, where):
            models[0].save_pretrained(Path(where) / "own")
            given.pop(0)

        def load(models, where):
            model = models.pop(0)
            plain = type(model).from_pretrained(Path(where) / "own", dtype=torch.float64)
            model.load_state_dict(plain.state_dict())

        loop.accelerator.register_save_state_pre_hook(save)
        loop.accelerator.register_load_state_pre_hook(load)
        loop.step()
        before = [weights(loop.model), weights(twin)]
        loop.accelerator.save_state(folder)
        with torch.no_grad():
            for p in (*loop.model.parameters(), *twin.parameters()):
                p.zero_()
        loop.accelerator.load_state(folder)
        after = [weights(loop.model), weights(twin)]
        same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in zip(before, after, strict=True)]
        return {"names": names(Path(folder)), "same": same}


def tied(folder: str) -> bool:
    """A tied head is written once, and there again."""
    with launched():
        seed()
        model = parallelize(_tied())
        loop = Loop("llama", 0, model=model)
        loop.step()
        before = weights(model)
        loop.accelerator.save_state(folder)
        loop.step()
        loop.accelerator.load_state(folder)
        after = weights(model)
        return all(torch.equal(before[n], after[n]) for n in before)


def _tied() -> nn.Module:
    from harness import tiny

    return tiny.build("llama", torch.float64, tie_word_embeddings=True)


class Executed:
    """What unpickling would call."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def refusals(folder: str) -> dict[str, Any]:
    """What is not saved, and not loaded."""
    with launched():
        seed()
        loop = Loop("llama", 0)
        loop.step()
        state, call = Path(folder) / "state", loop.accelerator
        found: dict[str, Any] = {}
        loop.counter.value = Executed(f"{folder}/executed")
        found["object"] = refused(lambda: call.save_state(str(state)))
        loop.counter.value = next(p for p in loop.model.parameters() if isinstance(p, DTensor))
        found["shards"] = refused(lambda: call.save_state(str(state)))
        found["nothing"] = state.exists()
        loop.counter.value = 1
        call.save_state(str(state))
        if dist.get_rank() == 0:
            (state / "notes.txt").write_text("the user's")
        dist.barrier()
        full = OSError("No space left on device")
        with mock.patch("hf_sp.integrations.accelerate_files.save_custom_state", side_effect=full):
            found["full"] = refused(lambda: call.save_state(str(state)))
        # Again over it, and what others have put there stays.
        call.save_state(str(state))
        found["names"] = names(state)
        options = {"load_kwargs": {"weights_only": False}}
        found["executing"] = refused(lambda: call.load_state(str(state), **options))
        registered = call._custom_objects.pop()
        found["fewer"] = refused(lambda: call.load_state(str(state)))
        call._custom_objects.append(registered)
        if dist.get_rank() == 0:
            _forge(state, Executed(f"{folder}/executed"))
        dist.barrier()
        before = weights(loop.model)
        found["forged"] = refused(lambda: call.load_state(str(state)))
        after = weights(loop.model)
        found["untouched"] = all(torch.equal(before[n], after[n]) for n in before)
        found["executed"] = Path(folder, "executed").exists()
        with contextlib.suppress(FileNotFoundError):
            (state / "hf_sp_manifest.json").unlink()
        dist.barrier()
        found["stock"] = refused(lambda: call.load_state(str(state)))
        return found


def _forge(state: Path, thing: Any) -> None:
    """A registered object's file that executes, with a manifest that fits it."""
    from hf_sp.checkpoint import folder as folders

    name = "custom_checkpoint_0.pkl"
    with (state / name).open("wb") as file:
        pickle.dump(thing, file)
    manifest = json.loads((state / folders.MANIFEST).read_text())
    manifest["files"][name] = folders._digest(state / name)
    (state / folders.MANIFEST).write_text(json.dumps(manifest))
