"""``python -m hf_sp.consolidate DIR``: a checkpoint's shards as the files of stock Trainer.

The optimizer's as ``optimizer.pt``, and the weights, where they are not plain already, as
``model-*.safetensors``. One process of stock Trainer without hf_sp resumes from the folder then.
Needs no ranks, and memory for the whole optimizer state.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from hf_sp.checkpoint.folder import check
from hf_sp.checkpoint.optimizer import OPTIMIZER_DIRECTORY, stock_state
from hf_sp.checkpoint.ranks import Ranks
from hf_sp.checkpoint.shards import Shards
from hf_sp.checkpoint.weights import WEIGHTS_DIRECTORY


def consolidate(folder: str | Path) -> list[Path]:
    """Write them into a checkpoint folder; their paths.

    Raises:
        CheckpointError: the folder is not complete.
    """
    folder = Path(folder)
    check(folder, Ranks())
    written: list[Path] = []
    if (folder / WEIGHTS_DIRECTORY).is_dir():
        written += _weights(Shards(folder / WEIGHTS_DIRECTORY), folder)
    if (folder / OPTIMIZER_DIRECTORY).is_dir():
        shards = Shards(folder / OPTIMIZER_DIRECTORY)
        likes = {k.rpartition(".")[0]: _like(shards, k) for k in shards.shapes}
        state = stock_state(shards, likes, {})
        written.append(_put(folder / "optimizer.pt", lambda path: torch.save(state, path)))
    return written


def _like(shards: Shards, key: str, device: str = "cpu") -> Tensor:
    return torch.empty(shards.shapes[key], dtype=shards.dtypes[key], device=device)


def _put(path: Path, write: Callable[[Path], object]) -> Path:
    """A file that is there when it is complete."""
    aside = path.with_suffix(".writing")
    write(aside)
    return aside.rename(path)


def _weights(shards: Shards, folder: Path) -> list[Path]:
    """One file after the other, not all at once; and the index that names their tensors."""
    likes = {k: _like(shards, k, "meta") for k in shards.shapes}
    split = split_torch_state_dict_into_shards(likes)
    written = []
    for name, keys in split.filename_to_tensors.items():
        tensors = {key: shards.read(key, _like(shards, key)) for key in keys}
        written.append(_put(folder / name, partial(save_file, tensors, metadata={"format": "pt"})))
    if split.is_sharded:
        index = json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        path = folder / "model.safetensors.index.json"
        written.append(_put(path, lambda aside: aside.write_text(index)))
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hf_sp.consolidate", description=__doc__)
    parser.add_argument("folder", help="a checkpoint folder of Trainer's")
    for path in consolidate(parser.parse_args(arguments).folder):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
