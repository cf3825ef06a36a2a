"""Arguments that argparse takes and no run has: refused before anything is counted."""

from __future__ import annotations

import argparse
from pathlib import Path

from hf_sp.errors import ConfigError

LEAST = {"lora": 0}
COUNTS = ("tp", "cp", "ep", "dp_shard", "seq", "batch", "layers", "search", "lora")
PICTURES = (".pdf", ".png", ".svg")


def check(options: argparse.Namespace) -> None:
    """Refuse numbers below one, and pictures that cannot be written.

    Raises:
        ConfigError: with what would do.
    """
    given = {name: getattr(options, name, None) for name in COUNTS}
    wrong = {n: x for n, x in given.items() if x is not None and x < LEAST.get(n, 1)}
    if wrong:
        raise ConfigError(
            "no run has such numbers",
            where=", ".join(f"--{name.replace('_', '-')}" for name in wrong),
            got=", ".join(map(str, wrong.values())),
            legal=", ".join(f"{LEAST.get(name, 1)} or more" for name in wrong),
        )
    file = getattr(options, "plot", None)
    if file and (Path(file).suffix not in PICTURES or not Path(file).absolute().parent.is_dir()):
        raise ConfigError(
            "no picture can be written there",
            where="--plot",
            got=file,
            legal=f"a file in a folder that exists, that ends in {', '.join(PICTURES)}",
        )
    if file and getattr(options, "search", None):
        raise ConfigError(
            "a picture shows tp and tokens, a search all degrees of so many GPUs",
            where="--plot, --search",
            legal="one of them",
        )
