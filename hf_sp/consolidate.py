"""``python -m hf_sp.consolidate DIR``: the optimizer's shards as the one file of stock Trainer.

The weights of a checkpoint are plain already. With ``optimizer.pt`` beside them, one process of
stock Trainer without hf_sp resumes from the folder. Needs no ranks, and memory for the whole state.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_sp.checkpoint.folder import check
from hf_sp.checkpoint.optimizer import OPTIMIZER_DIRECTORY, stock_state
from hf_sp.checkpoint.ranks import Ranks
from hf_sp.checkpoint.shards import Shards


def consolidate(folder: str | Path) -> Path:
    """Write ``optimizer.pt`` into a checkpoint folder; its path.

    Raises:
        CheckpointError: the folder is not complete.
    """
    folder = Path(folder)
    check(folder, Ranks())
    shards = Shards(folder / OPTIMIZER_DIRECTORY)
    likes = {k.rpartition(".")[0]: torch.empty(s, device="cpu") for k, s in shards.shapes.items()}
    path = folder / "optimizer.pt"
    aside = path.with_suffix(".writing")
    torch.save(stock_state(shards, likes, {}), aside)
    aside.rename(path)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hf_sp.consolidate", description=__doc__)
    parser.add_argument("folder", help="a checkpoint folder of Trainer's")
    sys.stdout.write(f"{consolidate(parser.parse_args(arguments).folder)}\n")


if __name__ == "__main__":
    main()
