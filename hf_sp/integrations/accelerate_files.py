"""``Accelerator.save_state`` and ``load_state`` with a parallelized model.

The files are accelerate's, but for the optimizers, which are shards. A state is written aside and
read when it is whole (``hf_sp.checkpoint.folder``); nothing in it is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.checkpointing import save_accelerator_state, save_custom_state
from accelerate.utils import MODEL_NAME, RNG_STATE_NAME, SAFE_MODEL_NAME, SCALER_NAME
from accelerate.utils import SCHEDULER_NAME as SCHEDULER
from torch import nn
from torch.distributed.tensor import DTensor

from hf_sp.checkpoint import folder as folders
from hf_sp.checkpoint.optimizer import OPTIMIZER_DIRECTORY, read_optimizer, write_optimizer
from hf_sp.checkpoint.ranks import Ranks, Together, listing, ranks_of
from hf_sp.errors import CheckpointError, ConfigError
from hf_sp.integrations.processes import as_ranks
from hf_sp.integrations.stock_files import (
    read_plain,
    refuse_missing,
    restore_random,
    without_tied,
)
from hf_sp.patching import Patch, Patches
from hf_sp.state import parallel_state
from hf_sp.torch_private import tree_leaves

PATCHES = Patches(lambda accelerator: _parallel(accelerator) is not None)
"""Patches of accelerators that have prepared a parallelized model."""


def _parallel(accelerator: Accelerator) -> nn.Module | None:
    return next((m for m in accelerator._models if parallel_state(m) is not None), None)


def _trained(accelerator: Accelerator) -> tuple[nn.Module, Ranks]:
    """All models of an accelerator as one, whose names an optimizer's state has; and its ranks."""
    models, parallel = accelerator._models, _parallel(accelerator)
    assert parallel is not None
    return parallel if len(models) == 1 else nn.ModuleList(models), ranks_of(parallel)


def _name(stem: str, number: int, ending: str) -> str:
    """Of the first, the second, ... of its kind, as accelerate counts them."""
    return f"{stem}{f'_{number}' if number else ''}{ending}"


def _automatic(accelerator: Accelerator, given: Any, call: str) -> Path | None:
    """The folder of the checkpoints that accelerate names; None if the user names them.

    Raises:
        ConfigError: neither does.
    """
    if accelerator.project_configuration.automatic_checkpoint_naming and accelerator.project_dir:
        return Path(accelerator.project_dir) / "checkpoints"
    if given is None:
        raise ConfigError(
            f"Accelerator.{call} was given no folder",
            rule="without one, the ProjectConfiguration names the checkpoints",
            remedy=f"{call}(folder), or ProjectConfiguration(project_dir, "
            "automatic_checkpoint_naming=True)",
        )
    return None


# --- saving -------------------------------------------------------------------------------------


@PATCHES.on(Accelerator, "save_state")
def write_state_aside(
    original: Patch,
    self: Accelerator,
    output_dir: str | None = None,
    safe_serialization: bool = True,
    **save_model_func_kwargs: Any,
) -> Path:
    """It writes the first rank's shard of the optimizer, file by file, in place.

    It deletes older checkpoints first.
    """
    project, (model, ranks) = self.project_configuration, _trained(self)
    if project.save_on_each_node:
        raise ConfigError(
            "save_on_each_node=True is not supported for a parallelized model",
            where="ProjectConfiguration",
            rule="the optimizer's shards of all nodes are read from one directory",
            remedy="write to a file system that all nodes share",
        )
    run = _automatic(self, output_dir, "save_state")
    folder = Path(output_dir or "") if run is None else _next(self, run, ranks)
    named = folders.about(model)["parameters"]
    entries = {**folders.about(_parallel(self) or model), "parameters": named}
    with folders.replacing(folder, ranks, entries, keep_others=run is None) as aside:
        # Who writes what goes by ranks, also where accelerate is shown groups of them.
        with Together(ranks, "the state could not be written", folder), as_ranks():
            _write(self, ranks, aside, safe_serialization)
        for number, optimizer in enumerate(self._optimizers):
            write_optimizer(model, optimizer, aside / _name(OPTIMIZER_DIRECTORY, number, ""))
    project.iteration += 1
    if run is not None and ranks.first:
        folders.rotate(run, project.total_limit, {folder})
    return folder


def _next(accelerator: Accelerator, run: Path, ranks: Ranks) -> Path:
    """The folder of the next checkpoint that accelerate names."""
    folder = run / f"checkpoint_{accelerator.save_iteration}"
    if ranks.tell(folder.exists()):
        raise CheckpointError(
            "the next checkpoint is there already",
            where=str(folder),
            rule="accelerate counts from ProjectConfiguration.iteration, which starts at 0",
            remedy="ProjectConfiguration(iteration=N), one more than the last checkpoint's",
        )
    return folder


def _write(accelerator: Accelerator, ranks: Ranks, folder: Path, safe: bool) -> None:
    """All but the optimizers. Whole weights come to the first rank, which writes alone.

    Each rank writes its own random state.
    """
    shards = [
        f"{type(thing).__name__}.state_dict()"
        for thing in (*accelerator._custom_objects, *accelerator._schedulers)
        if any(isinstance(x, DTensor) for x in tree_leaves(thing.state_dict()))
    ]
    if shards:
        raise CheckpointError(
            "a registered object holds shards",
            where="Accelerator.register_for_checkpointing",
            got=listing(shards),
            rule="every rank would be given the first rank's part when it is loaded",
            remedy="prepare models and optimizers; let state_dict() return whole tensors "
            "(x.full_tensor()), and load_state_dict() take this rank's part of them",
        )
    weights = [accelerator.get_state_dict(m, unwrap=False) for m in accelerator._models]
    for hook in accelerator._save_model_state_pre_hook.values():
        hook(accelerator._models, weights, str(folder))
    save_accelerator_state(
        str(folder),
        weights,
        [],
        accelerator._schedulers,
        accelerator._dataloaders if ranks.first else [],
        accelerator.state.process_index,
        accelerator.step,
        accelerator.scaler if ranks.first else None,
        safe_serialization=safe,
    )
    for number, thing in enumerate(accelerator._custom_objects):
        save_custom_state(thing, str(folder), number)
    # What cannot be read back without executing it is refused now, and not when it is needed.
    for path in sorted((*folder.glob("*.bin"), *folder.glob("custom_checkpoint_*.pkl"))):
        if ranks.first and not path.name.startswith(MODEL_NAME):
            read_plain(path)


# --- loading ------------------------------------------------------------------------------------


@PATCHES.on(Accelerator, "load_state")
def load_whole_state(
    original: Patch,
    self: Accelerator,
    input_dir: str | None = None,
    load_kwargs: dict[str, Any] | None = None,
    *,
    strict: bool = True,
    map_location: Any = None,
) -> None:
    """It gives every rank the first one's shard, and unpickles registered objects.

    Weights and optimizers go to the devices of their parameters, whatever ``map_location``.
    """
    if not (load_kwargs or {}).get("weights_only", True):
        raise ConfigError(
            "load_state(load_kwargs={'weights_only': False}) executes what is in the files",
            rule="checkpoints of parallelized models are tensors and plain data",
            remedy="leave it out; torch.serialization.add_safe_globals for classes of your own",
        )
    model, ranks = _trained(self)
    run = _automatic(self, input_dir, "load_state") if input_dir is None else None
    if run is not None:
        folder = folders.last_complete(run, ranks, model)
    else:
        folder = Path(input_dir or "").expanduser()
        folders.check(folder, ranks, model)
    models = list(self._models)
    for hook in self._load_model_state_pre_hook.values():
        hook(models, str(folder))
    with Together(ranks, "the state cannot be read", folder):
        found = _read(self, folder)
    for number, optimizer in enumerate(self._optimizers):
        read_optimizer(model, optimizer, folder / _name(OPTIMIZER_DIRECTORY, number, ""))
    with Together(ranks, "the state cannot be read", folder):
        for number, one in enumerate(models):
            _load_weights(one, folder, number, strict)
        for thing, state in found:
            thing.load_state_dict(state)
        _load_random(self, ranks, folder)


def _read(accelerator: Accelerator, folder: Path) -> list[tuple[Any, Any]]:
    """What is to be given a state, and the state."""
    things: list[tuple[Any, str]] = [
        (x, _name(SCHEDULER, i, ".bin")) for i, x in enumerate(accelerator._schedulers)
    ]
    for number, loader in enumerate(accelerator._dataloaders):
        if getattr(loader, "use_stateful_dataloader", False):
            things.append((loader, _name("dl_state_dict", number, ".bin")))
    if accelerator.scaler is not None:
        things.append((accelerator.scaler, SCALER_NAME))
    registered = accelerator._custom_objects
    things += [(x, f"custom_checkpoint_{i}.pkl") for i, x in enumerate(registered)]
    saved = len(list(folder.glob("custom_checkpoint_*.pkl")))
    lacking = [name for _, name in things if not (folder / name).is_file()]
    optimizers = len(list(folder.glob(f"{OPTIMIZER_DIRECTORY}*")))
    if lacking or saved != len(registered) or optimizers != len(accelerator._optimizers):
        lacking += [f"{saved} registered objects, here {len(registered)}"]
        lacking += [f"{optimizers} optimizers, here {len(accelerator._optimizers)}"]
        raise CheckpointError(
            "the checkpoint is of another set of prepared and registered objects",
            where=str(folder),
            got=listing(lacking),
            rule="what was prepared and registered when it was saved is there again, in this order",
        )
    return [(thing, read_plain(folder / name)) for thing, name in things]


def _load_weights(model: nn.Module, folder: Path, number: int, strict: bool) -> None:
    path = folder / _name(SAFE_MODEL_NAME, number, ".safetensors")
    if path.is_file():
        state = safetensors.torch.load_file(path)
    else:
        state = read_plain(folder / _name(MODEL_NAME, number, ".bin"))
    told = model.load_state_dict(state, strict=False)
    if strict:
        refuse_missing(without_tied(model, set(told.missing_keys)), str(path))


def _load_random(accelerator: Accelerator, ranks: Ranks, folder: Path) -> None:
    """Each rank its own state, or of another number of ranks the first one's.

    All ranks share one.
    """
    every = list(folder.glob(f"{RNG_STATE_NAME}_*.pkl"))
    alike = len(every) == ranks.size
    rank = ranks.rank if alike else 0
    saved = read_plain(folder / f"{RNG_STATE_NAME}_{rank}.pkl")
    accelerator.step = saved["step"]
    cuda = saved.get("torch_cuda_manual_seed")
    if cuda is not None and alike and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)
        cuda = None
    python, numpy = saved["random_state"], saved["numpy_random_seed"]
    restore_random(python, numpy, saved["torch_manual_seed"], cuda)
