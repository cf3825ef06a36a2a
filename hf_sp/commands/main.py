"""The command line: ``hf-sp COMMAND ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hf_sp.commands import consolidate, doctor, estimate, explain, given, verify
from hf_sp.errors import HfSpError

COMMANDS = {
    "estimate": estimate,
    "explain": explain,
    "verify": verify,
    "doctor": doctor,
    "consolidate": consolidate,
}


def parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    whole = argparse.ArgumentParser(prog="hf-sp", description="hf_sp, before a run.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        doc = str(module.__doc__)
        known = commands.add_parser(
            name,
            help=doc.partition("\n")[0],
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        known.add_argument("--json", action="store_true", help="print JSON instead of tables")
        module.add_arguments(known)
        known.set_defaults(run=module.run)
    return whole


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; a refusal is printed, and ends with status 2."""
    options = parser().parse_args(arguments)
    try:
        given.check(options)
        options.run(options)
    except HfSpError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
