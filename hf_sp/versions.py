"""The versions of other packages that the tests have run with; README.md says with which tests.

Read from metadata: a version that cannot even be imported is named first. Must not know hf_sp.
"""

from __future__ import annotations

import os
import re
import warnings
from importlib import metadata

# Oldest and newest tested, both included; what comes after the second number does not count.
TESTED: dict[str, tuple[str, str]] = {
    "torch": ("2.11", "2.14"),
    "transformers": ("5.17", "5.24"),
    "accelerate": ("1.12", "1.15"),
    "triton": ("3.6", "3.9"),
    "peft": ("0.21", "0.21"),
    "trl": ("1.16", "1.16"),
}


def untested() -> list[str]:
    """A clause for each package that is installed in a version outside its tested range."""
    found = []
    for package, (oldest, newest) in TESTED.items():
        try:
            installed = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if not _numbers(oldest) <= _numbers(installed) <= _numbers(newest):
            tested = oldest if oldest == newest else f"{oldest} to {newest}"
            found.append(f"{package} {installed} (tested: {tested})")
    return found


def warn_if_untested() -> None:
    """One warning that names each of them; under a launcher on the first rank only."""
    if os.environ.get("RANK", "0") == "0" and (found := untested()):
        warnings.warn(
            f"hf_sp has not been tested with {', '.join(found)}. It may work; if something fails, "
            "try a tested version first: README.md names them.",
            stacklevel=3,  # where hf_sp is imported
        )


def _numbers(version: str | None) -> tuple[int, ...]:
    """(5, 24) of "5.24.0.dev0"; of "main", or None in broken metadata, (): older than any."""
    return tuple(map(int, re.findall(r"\d+", version or "")[:2]))
