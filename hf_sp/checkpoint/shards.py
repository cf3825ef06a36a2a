"""Tensors that are spread over ranks, in safetensors files, with an index in JSON.

Each rank writes the rectangles that it owns; a reader of any number of ranks reads the slices that
it needs. Nothing is unpickled. Knows torch only.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_sp.checkpoint.folder import inside
from hf_sp.checkpoint.ranks import Ranks, Together
from hf_sp.comm.shard import merge_packed, split_packed
from hf_sp.errors import CheckpointError

INDEX = "index.json"
_FILE_BYTES = 1 << 30
"""A file is closed when it has that many; a rank keeps one of them in memory."""

Piece = tuple[list[int], Tensor]
"""Where a rank's part of a tensor starts, and the part."""


def _rectangles(parts: tuple[Tensor, ...], dim: int) -> Iterator[Piece]:
    """Where this rank's part of each tensor starts in them joined along ``dim``, and the part."""
    before = 0
    for x in parts:
        local, starts = x, [0] * x.dim()
        if isinstance(x, DTensor):
            (chunk,) = x.__create_chunk_list__()
            local, starts = x.to_local(), list(chunk.offsets)
        if len(parts) > 1:
            starts[dim] += before
            before += x.shape[dim]
        yield starts, local


def _owned(x: Tensor, ranks: Ranks) -> bool:
    """Whether this rank writes its part: it is not empty, and no earlier rank has the same."""
    if not isinstance(x, DTensor):
        return ranks.first
    where = x.device_mesh.get_coordinate() or ()
    copies = [at for at, p in zip(where, x.placements, strict=True) if p.is_replicate()]
    return not any(copies) and x.to_local().numel() > 0


def _batches(
    tensors: Mapping[str, Tensor], packed: Mapping[str, int], ranks: Ranks
) -> Iterator[tuple[str, dict[str, Piece]]]:
    """The files that this rank writes: a name, and by key where its piece starts, and the piece.

    The rectangles of one tensor are in files of their own.
    """
    batches: dict[int, dict[str, Piece]] = {}
    names = (f"rank-{ranks.rank:05d}-{number:05d}.safetensors" for number in itertools.count())
    for key, x in tensors.items():
        if not _owned(x, ranks):
            continue
        x, dim = x.detach(), packed.get(key, 0)
        parts = split_packed(x, dim) if key in packed else (x,)
        for i, piece in enumerate(_rectangles(parts, dim)):
            batches.setdefault(i, {})[key] = piece
            if sum(local.nbytes for _, local in batches[i].values()) >= _FILE_BYTES:
                yield next(names), batches.pop(i)
    for batch in batches.values():
        yield next(names), batch


def _write(path: Path, batch: dict[str, Piece]) -> None:
    offsets = {key: {"saved_offsets": starts} for key, (starts, _) in batch.items()}
    # By this torch.distributed.checkpoint's HuggingFaceStorageReader knows where pieces belong.
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    save_file({k: x.cpu().contiguous() for k, (_, x) in batch.items()}, path, metadata)


def save_shards(
    tensors: Mapping[str, Tensor],
    packed: Mapping[str, int],
    folder: Path,
    ranks: Ranks,
    more: Mapping[str, Any],
    later: list[Callable[[], Path]] | None = None,
) -> None:
    """Write tensors, DTensors by their parts, and an index. To be called on every rank.

    Args:
        tensors: the same names on every rank.
        packed: names of those that pack several which are sharded -> the dim that holds them.
        folder: made if need be.
        ranks: who writes.
        more: other entries of the index; plain data, the same on every rank.
        later: is given what writes each file of copies, instead of writing it now.
    """
    pieces: dict[str, list[Any]] = {}
    failing = Together(ranks, "tensors could not be written", folder)
    with failing:
        folder.mkdir(parents=True, exist_ok=True)
        for file, batch in _batches(tensors, packed, ranks):
            for key, (starts, local) in batch.items():
                pieces.setdefault(key, []).append([file, key, starts, list(local.shape)])
            if later is None:
                _write(folder / file, batch)
            else:
                later.append(functools.partial(_write_copy, folder / file, _copied(batch)))
    everyone = ranks.gather(pieces)
    with failing:
        if ranks.first:
            index: dict[str, Any] = {"tensors": {}, **more}
            for key, x in tensors.items():
                index["tensors"][key] = {
                    "dtype": str(x.dtype).removeprefix("torch."),
                    "shape": list(x.shape),
                    "pieces": [piece for part in everyone for piece in part.get(key, ())],
                }
            (folder / INDEX).write_text(json.dumps(index))


def _copied(batch: dict[str, Piece]) -> dict[str, Piece]:
    return {key: (starts, x.to("cpu", copy=True)) for key, (starts, x) in batch.items()}


def _write_copy(path: Path, batch: dict[str, Piece]) -> Path:
    _write(path, batch)
    batch.clear()
    return path


class Shards:
    """What ``save_shards`` wrote, to be read in slices.

    Args:
        folder: its folder.

    Raises:
        CheckpointError: there is no index, or it is no such index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        try:
            self.index: dict[str, Any] = json.loads((folder / INDEX).read_text())
            self.shapes = {k: tuple(t["shape"]) for k, t in self.index["tensors"].items()}
            self.dtypes = {k: dtype_of(t["dtype"]) for k, t in self.index["tensors"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(folder / INDEX, f"{type(error).__name__}: {error}") from error

    def read(self, key: str, like: Tensor, packed: int | None = None) -> Tensor:
        """A saved tensor, laid out as ``like``: this rank's part of it.

        Args:
            key: its name.
            like: a tensor of its shape, split in any way; its dtype does not count.
            packed: the dim that holds several tensors which are sharded.

        Raises:
            CheckpointError: the pieces do not cover it, or cannot be read.
        """
        x, dim = torch.zeros_like(like, dtype=self.dtypes[key]), packed or 0
        parts = (x,) if packed is None else split_packed(x, dim)
        for starts, local in _rectangles(parts, dim):
            self._fill(key, starts, local)
        return x if packed is None else merge_packed(parts, dim, x)

    def _fill(self, key: str, starts: list[int], local: Tensor) -> None:
        filled, path = 0, self.folder / INDEX
        try:
            for file, name, other, sizes in self.index["tensors"][key]["pieces"]:
                low = [max(a, b) for a, b in zip(starts, other, strict=True)]
                ends = zip(starts, local.shape, other, sizes, strict=True)
                high = [min(a + n, b + m) for a, n, b, m in ends]
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                path = inside(self.folder, file)
                if path not in self._open:
                    self._open[path] = safe_open(path, framework="pt")
                theirs = tuple(
                    slice(a - b, c - b) for a, b, c in zip(low, other, high, strict=True)
                )
                ours = tuple(slice(a - b, c - b) for a, b, c in zip(low, starts, high, strict=True))
                opened = self._open[path]
                values = opened.get_slice(name)[theirs] if theirs else opened.get_tensor(name)
                local[ours] = values.to(local.device)
                filled += values.numel()
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise _unreadable(path, f"{key}: {type(error).__name__}: {error}") from error
        if filled != local.numel():
            raise _unreadable(path, f"{key}: {filled} of {local.numel()} elements")


def _unreadable(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        "a checkpoint's tensors cannot be read",
        where=str(path),
        got=got,
        rule="files are as they were written, and cover what the index says",
        remedy="resume from another checkpoint",
    )


def dtype_of(name: str) -> torch.dtype:
    """The dtype of that name, and nothing else of torch's."""
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} is not a dtype")
    return found
