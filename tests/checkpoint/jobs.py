"""Rank functions: short runs of the stock Trainer and of loops of one's own, saved and resumed."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import logging
import os
import pickle
import resource
import shutil
import weakref
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from harness import tiny
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_sp import gloo, parallel_state, parallelize
from hf_sp.checkpoint import folder as folders
from hf_sp.checkpoint import gather
from hf_sp.checkpoint.ranks import Ranks, ranks_of
from hf_sp.errors import HfSpError
from hf_sp.optimizer_state import load_optimizer, save_optimizer

# Smaller than the harness's: files and gathers are what costs here.
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def whole(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: whole(p).clone() for n, p in model.named_parameters()}


class Rows(Dataset):
    """Rows of nine tokens."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, 90, (24, 9), generator=g)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i].clone()}


@contextlib.contextmanager
def launched():
    """The environment that a launcher makes, which accelerate reads."""
    names: dict[str, Any] = {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
    }
    from accelerate.state import AcceleratorState

    if dist.is_initialized() and dist.get_world_size() > 1:
        names |= {
            "RANK": dist.get_rank(),
            "LOCAL_RANK": dist.get_rank(),
            "WORLD_SIZE": dist.get_world_size(),
            "LOCAL_WORLD_SIZE": dist.get_world_size(),
        }
    os.environ.update({k: str(v) for k, v in names.items()})
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        AcceleratorState._reset_state(True)


def model_of(kind: str, seed: int = 0, parallel: bool = True, **options: Any) -> nn.Module:
    """``llama``, ``lora`` (on a llama), or a sparse family; parallelized over all ranks."""
    family = "llama" if kind == "lora" else kind
    fields = SMALL if family == "llama" else {}
    model = tiny.build(family, torch.float64, seed=seed, **fields)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config)
    return parallelize(model, **options) if parallel else model


def trainer_of(folder: Path, kind: str = "llama", seed: int = 0, options=None, **kwargs: Any):
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "seed": 3,
        "dataloader_pin_memory": False,
        **kwargs,
    }
    model = model_of(kind, seed, **(options or {}))
    return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=Rows())


def history(trainer: Trainer) -> list[tuple[int, float, float]]:
    return [
        (r["step"], r["loss"], float(r["grad_norm"]))
        for r in trainer.state.log_history
        if "loss" in r
    ]


def refused(call) -> str:
    """The text of our refusal; empty if there was none."""
    try:
        call()
    except HfSpError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def trains(folder: str, **kwargs: Any) -> dict[str, Any]:
    """A run, or the rest of one."""
    resume = kwargs.pop("resume", None)
    with launched():
        trainer = trainer_of(Path(folder), **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return {"history": history(trainer), "weights": weights(trainer.model)}


# --- what is on disk ----------------------------------------------------------------------------


def damaged(folder: str, damages: tuple[str, ...]) -> list[tuple[str, bool]]:
    """The refusal of each damage to a complete checkpoint, and whether the model was untouched."""
    answers = []
    with launched():
        trainer = trainer_of(Path(folder) / "run", max_steps=2)
        trainer.train()
        before = weights(trainer.model)
        for number, name in enumerate(damages):
            copy = Path(folder) / f"copy{number}" / "checkpoint-2"
            if dist.get_rank() == 0:
                shutil.copytree(Path(folder) / "run" / "checkpoint-2", copy)
                DAMAGES[name](copy)
            dist.barrier()
            text = refused(lambda c=copy: trainer.train(resume_from_checkpoint=str(c)))
            after = weights(trainer.model)
            answers.append((text, all(torch.equal(w, after[n]) for n, w in before.items())))
    return answers


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _garble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _older(path: Path) -> None:
    shutil.copy(path.parents[2] / "run" / "checkpoint-1" / path.name, path)


def _edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _resign(folder: Path) -> None:
    """A manifest that fits whatever is there, as a forger would write it."""
    files = {name: folders._digest(folder / name) for name in folders._files(folder)}
    del files[folders.MANIFEST]
    _edit(folder / folders.MANIFEST, lambda m: m.update(files=files))


SHARD = "optimizer_shards/rank-00001-00000.safetensors"


def _escape(folder: Path) -> None:
    shutil.copy(folder / SHARD, folder.parent / "outside.safetensors")

    def change(index: dict[str, Any]) -> None:
        for tensor in index["tensors"].values():
            for piece in tensor["pieces"]:
                if piece[0].startswith("rank-00001"):
                    piece[0] = "../../outside.safetensors"

    _edit(folder / "optimizer_shards/index.json", change)
    _resign(folder)


def _holes(folder: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        for tensor in index["tensors"].values():
            tensor["pieces"] = tensor["pieces"][:1]

    _edit(folder / "optimizer_shards/index.json", change)
    _resign(folder)


def _old_format(folder: Path) -> None:
    (folder / "optimizer_shards").rename(folder / "optimizer_dcp")
    (folder / folders.MANIFEST).unlink()


def _stock_without(*names: str):
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "optimizer_shards")
        torch.save({}, folder / "optimizer.pt")
        for name in (folders.MANIFEST, *names):
            (folder / name).unlink()

    return change


def _stock_index(folder: Path) -> None:
    _stock_without()(folder)
    content = {"weight_map": {"model.norm.weight": "../../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


DAMAGES = {
    "weights cut": lambda f: _cut(f / "model.safetensors"),
    "weights garbled": lambda f: _garble(f / "model.safetensors"),
    "weights missing": lambda f: (f / "model.safetensors").unlink(),
    "weights of another step": lambda f: _older(f / "model.safetensors"),
    "shard cut": lambda f: _cut(f / SHARD),
    "shard garbled": lambda f: _garble(f / SHARD),
    "shard missing": lambda f: (f / SHARD).unlink(),
    "optimizer missing": lambda f: shutil.rmtree(f / "optimizer_shards"),
    "schedule missing": lambda f: (f / "scheduler.pt").unlink(),
    "schedule of another step": lambda f: _older(f / "scheduler.pt"),
    "random state of one rank cut": lambda f: _cut(f / "rng_state_1.pth"),
    "trainer state cut": lambda f: _cut(f / "trainer_state.json"),
    "manifest missing": lambda f: (f / folders.MANIFEST).unlink(),
    "manifest cut": lambda f: _cut(f / folders.MANIFEST),
    "manifest of a later format": lambda f: _edit(
        f / folders.MANIFEST, lambda m: m.update(format=2)
    ),
    "manifest leads out": lambda f: _edit(
        f / folders.MANIFEST, lambda m: m["files"].update({"../x": {"bytes": 0, "sha256": ""}})
    ),
    "manifest of nonsense": lambda f: (f / folders.MANIFEST).write_text("[1]"),
    "another model": lambda f: _edit(
        f / folders.MANIFEST,
        lambda m: m["parameters"].update({"model.norm.weight": ["float64", [33]], "x": ["", []]}),
    ),
    "of an earlier version": _old_format,
    "stock without schedule": _stock_without("scheduler.pt"),
    "stock without trainer state": _stock_without("trainer_state.json"),
    "stock index leads out": _stock_index,
}
# Refused while it is read: the digests fit.
FORGED = {"optimizer leads out": _escape, "optimizer has holes": _holes}
DAMAGES |= FORGED


class Bomb:
    """Executed when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (Path(self.marker),))


def planted(folder: str, checkpoint: str) -> dict[str, str]:
    """A pickle in the place of each file, with a manifest that fits; what resuming said."""
    answers: dict[str, str] = {}
    with launched():
        options = {"checkpoint": checkpoint}
        trainer = trainer_of(Path(folder) / "run", max_steps=1, options=options)
        trainer.train()
        good = Path(folder) / "run" / "checkpoint-1"
        names = [
            *folders._files(good),
            "optimizer.pt",
            "optimizer_dcp/.metadata",
            "pytorch_model.bin",
        ]
        for name in names:
            for form in ("pickle", "torch"):
                copy = Path(folder) / "planted" / "checkpoint-1"
                dist.barrier()
                if dist.get_rank() == 0:
                    shutil.rmtree(copy.parent, ignore_errors=True)
                    shutil.copytree(good, copy)
                    if name == "optimizer.pt":
                        shutil.rmtree(copy / "optimizer_shards")
                    if name == "pytorch_model.bin":
                        (copy / "model.safetensors").unlink(missing_ok=True)
                        shutil.rmtree(copy / "weights_shards", ignore_errors=True)
                    (copy / name).parent.mkdir(exist_ok=True)
                    bomb = Bomb(str(Path(folder) / "executed"))
                    data = io.BytesIO()
                    (torch.save if form == "torch" else pickle.dump)(bomb, data)
                    (copy / name).write_bytes(data.getvalue())
                    if name != folders.MANIFEST:
                        _resign(copy)
                dist.barrier()
                answers[f"{name} {form}"] = "resumed"
                try:
                    trainer.train(resume_from_checkpoint=str(copy))
                except Exception as error:  # any error will do, if nothing is executed
                    answers[f"{name} {form}"] = f"{type(error).__name__}: {error}"
    return answers


def passes_over(folder: str) -> tuple[str, list[str], str]:
    """Where ``resume_from_checkpoint=True`` begins when the newest is damaged, and what is said."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, run = Handler(), Path(folder) / "run"
    logging.getLogger("hf_sp").addHandler(handler)
    with launched():
        trainer_of(run, max_steps=3).train()
        if dist.get_rank() == 0:
            _cut(run / "checkpoint-3" / SHARD)
        dist.barrier()
        trainer = trainer_of(run, seed=5, max_steps=3, save_strategy="no")
        steps = []

        class Note(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                steps.append(state.global_step)

        trainer.add_callback(Note())
        trainer.train(resume_from_checkpoint=True)
        logging.getLogger("hf_sp").removeHandler(handler)
        if dist.get_rank() == 0:
            for step in (1, 2):
                _cut(run / f"checkpoint-{step}" / "model.safetensors")
        dist.barrier()
        nothing = refused(lambda: trainer.train(resume_from_checkpoint=True))
    return f"{steps}", said, nothing


# --- saving that fails --------------------------------------------------------------------------

POINTS = (
    (torch, "save"),
    (safetensors.torch, "serialize_file"),
    (Path, "write_text"),
    (Path, "rename"),
    (Path, "mkdir"),
    (os, "fsync"),
    (os, "rmdir"),
)


@contextlib.contextmanager
def failing_at(point: int, act):
    """Act before the point-th thing that is done to the disk; yields what was done."""
    done: list[str] = []
    originals = [getattr(owner, name) for owner, name in POINTS]

    def wrapped(name, original):
        def call(*args, **kwargs):
            done.append(name)
            if len(done) == point:
                act()
            return original(*args, **kwargs)

        return call

    for (owner, name), original in zip(POINTS, originals, strict=True):
        setattr(owner, name, wrapped(name, original))
    try:
        yield done
    finally:
        for (owner, name), original in zip(POINTS, originals, strict=True):
            setattr(owner, name, original)


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fails_to_save(folder: str, rank: int) -> dict[str, Any]:
    """A save over an older checkpoint with each thing failing in turn on one rank."""
    run = Path(folder) / "run"
    outcomes: list[str] = []
    with launched():
        trainer = trainer_of(run, max_steps=1)
        trainer.train()
        ranks = ranks_of(trainer.model)
        target = run / "checkpoint-1"
        point = 0
        while True:
            point += 1
            before = json.loads((target / folders.MANIFEST).read_text())["files"]
            act = full_disk if dist.get_rank() == rank else lambda: None
            with failing_at(point, act) as done:
                text = refused(lambda: trainer._save_checkpoint(trainer.model, None))
            # The other rank does another number of things.
            over = ranks.gather(len(done) < point)[rank]
            assert folders.faults(target, ranks, trainer.model) == [], (point, done)
            after = json.loads((target / folders.MANIFEST).read_text())["files"]
            assert not text or before["model.safetensors"] == after["model.safetensors"]
            if over:
                break
            outcomes.append(text)
        trainer._save_checkpoint(trainer.model, None)
    return {"outcomes": outcomes, "left": sorted(p.name for p in run.iterdir())}


@contextlib.contextmanager
def small_files():
    """On the writing rank the system lets no file of tensors grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def wrapped(original):
        def call(*args, **kwargs):
            # Not for longer: the rendezvous is a file too.
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
            try:
                return original(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        return call

    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 0:
            for owner, name in POINTS[:2]:
                original = getattr(owner, name)
                stack.callback(setattr, owner, name, original)
                setattr(owner, name, wrapped(original))
        yield


def limited(folder: str, kind: str) -> list[str]:
    """Saves of all kinds that the system cuts off, and with a file in the way; then good ones."""
    optimizer = Path(folder) / "optimizer"
    with launched():
        trainer = trainer_of(Path(folder) / "run", kind, max_steps=1)
        trainer.train()
        model = trainer.model
        with small_files():
            texts = [
                refused(lambda: trainer._save_checkpoint(model, None)),
                refused(lambda: trainer.save_model(f"{folder}/model")),
                refused(lambda: model.save_pretrained(f"{folder}/plain")),
                refused(lambda: save_optimizer(model, trainer.optimizer, optimizer)),
            ]
        if dist.get_rank() == 0:
            (Path(folder) / "file").write_text("in the way")
        dist.barrier()
        texts += [
            refused(lambda: model.save_pretrained(f"{folder}/file")),
            refused(lambda: save_optimizer(model, trainer.optimizer, f"{folder}/file")),
        ]
        trainer._save_checkpoint(model, None)
        trainer.save_model(f"{folder}/model")
        save_optimizer(model, trainer.optimizer, optimizer)
        load_optimizer(model, trainer.optimizer, optimizer)
        ranks = ranks_of(model)
        assert folders.faults(Path(folder) / "run" / "checkpoint-1", ranks, model) == []
    return texts


def killed(folder: str) -> list[str]:
    """Forked processes that end at each thing done to the disk in turn; which state is left.

    On one rank, whose save is the same code without collectives.
    """
    run, states = Path(folder) / "run", []
    with launched():
        trainer = trainer_of(run, max_steps=1)
        trainer.train()
        target = run / "checkpoint-1"
        pristine = Path(folder) / "pristine"
        shutil.copytree(target, pristine)
        old = json.loads((pristine / folders.MANIFEST).read_text())["files"]
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.mul_(1.5)
        point = 0
        while not states or states[-1] != "finished":
            point += 1
            for leftover in run.iterdir():
                shutil.rmtree(leftover)
            shutil.copytree(pristine, target)
            child = os.fork()
            if not child:
                with failing_at(point, lambda: os._exit(9)):
                    trainer._save_checkpoint(trainer.model, None)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            found = folders.last_complete(run, Ranks(), trainer.model)
            new = json.loads((found / folders.MANIFEST).read_text())["files"]
            states.append("old" if new == old else "new")
            if os.waitstatus_to_exitcode(status) == 0:
                states.append("finished")
    return states


# --- what saving costs --------------------------------------------------------------------------


def peak(folder: str, kind: str, size: int, **options: Any) -> dict[str, int]:
    """Most bytes of whole tensors that are alive at a time while a model is saved."""
    alive, most = 0, 0
    original = gather.whole

    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal alive, most
        gloo.finish()  # or its threads may hold what was gathered before
        full = original(x)
        if not isinstance(x, DTensor) or full.data_ptr() == x.to_local().data_ptr():
            return full  # the model's own
        count = full.nbytes
        alive += count
        most = max(most, alive)

        def gone() -> None:
            nonlocal alive
            alive -= count

        weakref.finalize(full.untyped_storage(), gone)
        return full

    model = model_of(kind, **options)
    gather.whole = counted
    try:
        model.save_pretrained(folder, max_shard_size=size)
    finally:
        gather.whole = original
    files = [p.stat().st_size for p in Path(folder).glob("*.safetensors")]
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    dist.barrier()
    return {"peak": most, "files": len(files), "largest": largest, "model": sum(files)}


# --- other degrees ------------------------------------------------------------------------------


def loop_saves(folder: str, kind: str, **options: Any) -> dict[str, Any]:
    """A loop of one's own: two steps, saved, and two more."""
    model = model_of(kind, **options)
    # The auxiliary loss of a batch is not the mean of its halves'.
    model.config.output_router_logits = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    for step in range(2):
        loop_step(model, optimizer, step)
    model.save_pretrained(f"{folder}/weights")
    save_optimizer(model, optimizer, f"{folder}/optimizer")
    return {"losses": [loop_step(model, optimizer, step) for step in (2, 3)]}


def loop_resumes(folder: str, kind: str, **options: Any) -> dict[str, Any]:
    """The rest of it, from what was saved."""
    model = model_of(kind, seed=5, **options)
    model.config.output_router_logits = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    plain = type(model).from_pretrained(f"{folder}/weights", dtype=torch.float64)
    model.load_state_dict(plain.state_dict())
    load_optimizer(model, optimizer, f"{folder}/optimizer")
    return {"losses": [loop_step(model, optimizer, step) for step in (2, 3)]}


def loop_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    """One step; the mean loss of all groups' batches, which are the same for any number of them."""
    g = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 90, (4, 9), generator=g)
    state = parallel_state(model)
    groups, group = state.data, state.everyone.rank // state.tp
    rows = ids.chunk(groups)[group]
    loss = model(input_ids=rows, labels=rows).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def lone_save(folder: str) -> list[str]:
    """A save on one rank alone, then a right one."""
    model = model_of("llama")
    os.environ["HF_SP_SAVE_TIMEOUT"] = "1"
    try:
        text = refused(lambda: model.save_pretrained(folder)) if dist.get_rank() == 0 else ""
    finally:
        del os.environ["HF_SP_SAVE_TIMEOUT"]
    dist.barrier()
    model.save_pretrained(folder)
    return [text, *sorted(p.name for p in Path(folder).iterdir())]


def stock_trains(folder: str, kind: str, resume: str) -> list[tuple[int, float, float]]:
    """The rest of a run with the unmodified model."""
    with launched():
        trainer = trainer_of(
            Path(folder), kind, seed=5, options={"parallel": False}, save_strategy="no"
        )
        if kind == "qwen3_moe":
            # Stock Trainer does not convert a checkpoint's experts, its own neither.
            plain = type(trainer.model).from_pretrained(resume, dtype=torch.float64)
            trainer.model.load_state_dict(plain.state_dict())
        trainer.train(resume_from_checkpoint=resume)
        return history(trainer)


def many_files(folder: str, kind: str, seed: int = 0, resume: str = "") -> dict[str, Any]:
    """A run whose checkpoints have several files of weights, or the rest of it."""
    with launched():
        trainer = trainer_of(Path(folder), kind, seed=seed)
        save = trainer.model.save_pretrained
        vars(trainer.model)["save_pretrained"] = functools.partial(save, max_shard_size="40KB")
        trainer.train(resume_from_checkpoint=resume or None)
        files = len(list(Path(folder).glob("checkpoint-2/model-*.safetensors")))
        return {"history": history(trainer), "weights": weights(trainer.model), "files": files}
