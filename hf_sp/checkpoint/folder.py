"""Checkpoint folders: written aside, put in place when complete, checked before they are read.

A folder is written as ``.NAME.writing/NAME`` beside its place, digested and synced by all ranks,
given a manifest, and renamed. So a folder in its place is complete, and a kill at any moment leaves
the one before. Nothing here unpickles. Knows torch only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import nn

from hf_sp.checkpoint.background import Writing
from hf_sp.checkpoint.ranks import UNTOUCHED, Ranks, Together, listing
from hf_sp.errors import CheckpointError
from hf_sp.state import parallel_state

logger = logging.getLogger(__name__)

MANIFEST = "hf_sp_manifest.json"
OLD_OPTIMIZER = "optimizer_dcp"
"""What earlier versions wrote; it can only be read by unpickling."""

_ASIDE, _OLD, _FORMAT = ".writing", ".old", 1
_RULE = "all files are there as they were saved, and are of this model"


def about(model: nn.Module) -> dict[str, Any]:
    """What a manifest says of a model: how it is split, and its parameters' dtypes and shapes."""
    s = parallel_state(model)
    degrees = (1, 1, 1, 1) if s is None else (s.everyone.size, s.tp, s.data, s.plan.ep)
    named = {n: [str(p.dtype)[6:], list(p.shape)] for n, p in model.named_parameters()}
    return {**dict(zip(("world", "tp", "dp", "ep"), degrees, strict=True)), "parameters": named}


# --- writing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(
    folder: str | Path,
    ranks: Ranks,
    entries: Mapping[str, Any],
    keep_others: bool = False,
    writing: Writing | None = None,
) -> Iterator[Path]:
    """Write a folder aside, and put it in place of an older one when all ranks have written.

    To be entered on every rank, which all see the same file system. What the block writes into the
    path that it is given is complete and synced, or is never seen under the folder's name: after an
    error, or a kill, the older folder is as it was.

    Args:
        folder: where it will be.
        ranks: who writes.
        entries: of the manifest.
        keep_others: files that are not in the older one's manifest stay, unless they are replaced.
        writing: takes over at the end of the block, and puts the folder in place later.

    Raises:
        CheckpointError: on all ranks, if one could not write.
    """
    folder = Path(folder)
    aside = folder.parent / f".{folder.name}{_ASIDE}" / folder.name
    failing = Together(ranks, "the checkpoint could not be written", folder, UNTOUCHED)

    def put(files: dict[str, Any]) -> None:
        manifest = {"format": _FORMAT, **entries, "files": dict(sorted(files.items()))}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _digest(aside / MANIFEST, sync=True)
        if keep_others and folder.exists():
            _carry_over(folder, aside)
        _put_in_place(aside, folder)

    try:
        with failing:
            if ranks.first:
                if folder.exists() and not folder.is_dir():
                    raise FileExistsError(f"{folder} is a file")
                tidy(folder.parent)
                for left in (aside.parent, *folder.parent.glob(f".checkpoint[-_]*{_ASIDE}")):
                    shutil.rmtree(left, ignore_errors=True)
                aside.mkdir(parents=True)
        with failing:
            yield aside
        names = ranks.tell(_files(aside))
        if writing is not None:
            writing.start(names, lambda name: _digest(aside / name, sync=True), aside, put)
            return
        with failing:
            mine = {n: _digest(aside / n, sync=True) for n in names[ranks.rank :: ranks.size]}
        files = {name: found for part in ranks.gather(mine) for name, found in part.items()}
        with failing:
            if ranks.first:
                put(files)
    finally:
        if ranks.first and not (writing and writing.started):
            shutil.rmtree(aside.parent, ignore_errors=True)


def _carry_over(folder: Path, aside: Path) -> None:
    """Give the new folder what somebody else has put into the older one; links, no copies."""
    manifest = folder / MANIFEST
    saved = json.loads(manifest.read_text())["files"] if manifest.is_file() else ()
    for name in _files(folder):
        if name not in saved and not (aside / name).exists():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / name, aside / name)
            except OSError:
                shutil.copy2(folder / name, aside / name)


def _put_in_place(aside: Path, folder: Path) -> None:
    for inner in (p for p in (aside, *aside.rglob("*")) if p.is_dir()):
        _sync(inner)
    old = folder.parent / f".{folder.name}{_OLD}"
    if folder.exists():
        folder.rename(old)
    # A kill here leaves the old one under its hidden name: ``tidy`` puts it back.
    try:
        aside.rename(folder)
    finally:
        tidy(folder.parent)
    _sync(folder.parent)


def tidy(parent: Path) -> None:
    """End what a kill has cut off: put an older folder back whose successor is not in place."""
    for old in parent.glob(f".*{_OLD}"):
        folder = parent / old.name.removeprefix(".").removesuffix(_OLD)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)


def rotate(parent: Path, limit: int | None, keep: set[Path]) -> None:
    """Delete the oldest ``checkpoint-N`` until ``limit`` are left; never one of ``keep``.

    A deleted one first leaves its place, so that a kill leaves no half of it there.
    """
    found = sorted(_checkpoints(parent), key=lambda p: p.stat().st_mtime)
    spare = len(found) - max(limit, len(keep)) if limit and limit > 0 else 0
    for folder in [p for p in found if p not in keep][: max(spare, 0)]:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder.rename(parent / f".{folder.name}{_ASIDE}"))


def _checkpoints(parent: Path) -> list[Path]:
    """The folders ``checkpoint-N`` (Trainer's) and ``checkpoint_N`` (accelerate's), by N."""
    found = [p for p in parent.glob("checkpoint[-_]*") if p.is_dir() and p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _digest(path: Path, sync: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# --- reading ------------------------------------------------------------------------------------


def inside(folder: Path, name: Any) -> Path:
    """The file of that name in a folder; ValueError if the name leads out of it."""
    pure = PurePosixPath(str(name))
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{name} is a path outside of the checkpoint")
    return folder / pure


def faults(folder: str | Path, ranks: Ranks, model: nn.Module | None = None) -> list[str]:
    """Why a checkpoint cannot be read, the same on every rank; empty if it can.

    To be called on every rank. Each reads a part of the files: with a manifest they are compared
    with their digests, and the parameters with the model's.
    """
    folder, problems = Path(folder), list[str]()
    ours = (folder / MANIFEST).is_file()
    try:
        if ours:
            _compare(folder, ranks, model, problems)
        else:
            _look(folder, problems)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = MANIFEST if ours else "trainer_state.json or an index"
        problems.append(f"{what}: {type(error).__name__}: {error}")
    return sorted({p for told in ranks.gather(problems) for p in told})


def _compare(folder: Path, ranks: Ranks, model: nn.Module | None, problems: list[str]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest["format"] != _FORMAT:
        raise ValueError(f"format {manifest['format']}, this version reads {_FORMAT}")
    for name, want in sorted(manifest["files"].items())[ranks.rank :: ranks.size]:
        path = inside(folder, name)
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != want["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, {want['bytes']} were saved")
        elif _digest(path) != want:
            problems.append(f"{name} is not what was saved: its digest differs")
    saved = manifest.get("parameters")
    if model is not None and saved is not None:
        here, none = about(model)["parameters"], (None, "no such parameter")
        pairs = ((n, saved.get(n, none)[1], here.get(n, none)[1]) for n in {*saved, *here})
        problems += [f"{n}: {x} in the checkpoint, {y} in the model" for n, x, y in pairs if x != y]


def _look(folder: Path, problems: list[str]) -> None:
    """A folder without a manifest: what stock Trainer writes is taken, with all that belongs."""
    names = {p.name for p in folder.iterdir()}
    if old := names & {OLD_OPTIMIZER, ".metadata"}:
        problems.append(f"{min(old)}: of an earlier version of hf_sp, read by unpickling")
    elif any("shards" in name for name in names):
        problems.append(f"{MANIFEST} is missing")
    if "trainer_state.json" in names:
        json.loads((folder / "trainer_state.json").read_text())
    else:
        problems.append(f"neither {MANIFEST} nor trainer_state.json is there")
    pair = {"optimizer.pt", "scheduler.pt"}
    if OLD_OPTIMIZER not in names and pair & names:
        problems += [f"{name} is missing" for name in pair - names]
    for index in folder.glob("*.index.json"):
        weights = set(json.loads(index.read_text())["weight_map"].values())
        problems += [f"{w} is missing" for w in weights if not inside(folder, w).is_file()]


def check(folder: str | Path, ranks: Ranks, model: nn.Module | None = None) -> None:
    """Refuse a checkpoint that is incomplete, changed, or another model's.

    Raises:
        CheckpointError: on every rank alike; the model is untouched.
    """
    folder = Path(folder)
    _mend(folder.parent, ranks)
    if found := faults(folder, ranks, model):
        raise CheckpointError(
            "the checkpoint cannot be read",
            where=str(folder),
            got=listing(found),
            rule=_RULE,
            remedy="the last complete one of a run: Trainer's resume_from_checkpoint=True, or "
            "load_state() of an Accelerator that names its checkpoints",
        )


def _mend(parent: Path, ranks: Ranks) -> list[str]:
    """``tidy`` by the first rank; the names of the checkpoints that it then sees, by step."""
    with Together(ranks, "the checkpoints cannot be listed", parent):
        if ranks.first:
            tidy(parent)
    return ranks.tell([p.name for p in _checkpoints(parent)])


def last_complete(parent: str | Path, ranks: Ranks, model: nn.Module | None = None) -> Path:
    """The newest complete ``checkpoint-N`` of a folder; says which it passes over, and why.

    Raises:
        CheckpointError: there is none.
    """
    parent = Path(parent)
    skipped = []
    for name in reversed(_mend(parent, ranks)):
        problems = faults(parent / name, ranks, model)
        if not problems:
            return parent / name
        skipped.append(f"{name}: {problems[0]}")
        if ranks.first:
            logger.warning("Not resumed from %s: %s", parent / name, "; ".join(problems[:3]))
    raise CheckpointError(
        "there is no complete checkpoint to resume from",
        where=str(parent),
        got=listing(skipped) or "no folder of a checkpoint",
        rule=_RULE,
        remedy="start without resuming",
    )
