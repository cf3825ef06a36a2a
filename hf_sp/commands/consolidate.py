"""Plain files of a checkpoint's shards: stock Trainer without hf_sp resumes from the folder then.

hf-sp consolidate out/checkpoint-500
"""

from __future__ import annotations

import argparse
import json
import sys

from hf_sp.consolidate import consolidate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="a checkpoint folder of Trainer's")


def run(options: argparse.Namespace) -> None:
    """The command: the paths that were written."""
    written = [str(path) for path in consolidate(options.folder)]
    text = json.dumps({"written": written}, indent=1) if options.json else "\n".join(written)
    sys.stdout.write(text + "\n")
