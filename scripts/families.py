"""Which causal LM families of the installed transformers work: docs/families.md, from runs.

python scripts/families.py              every family, on two ranks and on four
python scripts/families.py llama qwen3  these; the other rows stay as they are
python scripts/families.py --heads      classifiers and question answering

A tiny model of each class is compared with itself unsharded: loss, every gradient and the norm of
two clipped steps, weights after them, logits, greedy generate, and the saved checkpoint. What is
refused is told with its reason. Not zero if a family that is not refused differs.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: E402

import hf_sp  # noqa: E402
from scripts._families import models, vision  # noqa: E402
from scripts._families.ranks import Ranks  # noqa: E402

PAGE = ROOT / "docs" / "families.md"
HEAD = """# Families

Written by `python scripts/families.py`, with transformers {version}; a test compares it with what
`hf_sp.supports` says. A tiny model of each causal LM class was trained for two clipped steps on
{tps} ranks, in float64, padded at a length of 13 and whole at 16, and compared with itself
unsharded: loss, **every gradient**, the gradient norm, the weights afterwards, logits, greedy
`generate`, and the saved checkpoint read by plain transformers. Numbers are the largest difference,
relative to the largest element; transformers' float32 inside of a float64 model makes them 1e-7 or
so. Vision-language models are given a picture in each row in the first step, and text alone in the
second; gradients of the vision tower are compared too. Other wrappers are not in the list. Before a
launch, ask: `hf_sp.supports(name_or_config, tp=8)`.
"""
VISION = """
## {count} vision-language models exact

| model | gradients | weights | logits |
|---|---|---|---|
"""
OTHERS = """
## Other heads

On two ranks, without `generate`.

| head | of | exact | others |
|---|---|---|---|
"""
EXACT = """
## {count} exact

| family | gradients | weights | logits |
|---|---|---|---|
"""
WRONG = """
## {count} that differ

| family | what |
|---|---|
"""
REFUSED = """
## {count} refused

| reason | where, in the first | families |
|---|---|---|
"""


def verdict(family: str) -> tuple[str, str]:
    """``("", "")`` if the plan is carried out, else why not, and where."""
    found: Any = None
    if family in vision.FAMILIES:
        supported = hf_sp.supports(
            vision.config(family), 2, model_class=AutoModelForImageTextToText
        )
        return ("", "") if supported else (supported.reason.splitlines()[0], "")
    for config in (models.config, models.default_config):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                made = config(family)
                with torch.device("meta"):
                    AutoModelForCausalLM.from_config(made)
            except Exception:  # whatever transformers makes of values that do not suit it
                continue
            # An error of ours that is no refusal is not transformers'.
            found = hf_sp.supports(made, tp=2)
            break
    if found is None:
        return "transformers builds no model from its config", ""
    if found:
        return "", ""
    what, *rest = found.reason.partition(": ")[2].splitlines()
    # Without the name of the class: families share reasons.
    what = re.sub(r"^\w+: ", "", re.sub(r"(^|for )\w*[A-Z]\w*( has no|$)", r"\1it\2", what))
    parts = dict(line.strip().split(":", 1) for line in rest if re.match(r"  (where|got):", line))
    where = parts.get("where", parts.get("got", "")).strip()
    return what, re.sub(r"^.*?\.(\d+|\*)\.", "", where)


def row(family: str, *ranks: Ranks) -> tuple[str, str]:
    """The kind of the family's row, and the row: the worst of all numbers of ranks."""
    path = "scripts._families.compare:check"
    answers = [answer for some in ranks for answer in some.ask(path, family, seconds=180)]
    errors = [error for _, error in answers if error]
    if errors:
        print(errors[0], file=sys.stderr)
        text = errors[0].strip().splitlines()[-1][:100].replace("|", "/")
        return "wrong", f"| {family} | {text} |"
    problems = [p for found, _ in answers for p in found["problems"]]
    if problems:
        return "wrong", f"| {family} | {'; '.join(dict.fromkeys(problems))} |"
    found = [
        max(answer["errors"][kind] for answer, _ in answers)
        for kind in ("gradients", "weights", "logits")
    ]
    return "exact", f"| {family} | " + " | ".join(f"{error:.0e}" for error in found) + " |"


def everyone() -> list[str]:
    """All that is asked of each release of transformers."""
    return [*models.families(), *sorted(vision.FAMILIES)]


def head_row(head: str, ranks: Ranks) -> str:
    """How the families do that have a class with a head, and are not refused."""
    names = [n for n in models.with_head(head) if verdict(n.partition(", ")[0]) == ("", "")]
    wrong = {}
    for name in names:
        kind, found = row(name, ranks)
        print(f"{kind:<6} {found}", flush=True)
        if kind != "exact":
            wrong[name.partition(", ")[0]] = found.split(" | ")[1].rstrip(" |")
    others = "; ".join(f"{name}: {what}" for name, what in wrong.items()) or "-"
    return f"| {head} | {len(names)} | {len(names) - len(wrong)} | {others} |"


def read_heads(page: Path = PAGE) -> list[str]:
    """The rows of the table of heads."""
    lines = page.read_text().splitlines() if page.exists() else []
    return [
        line for line in lines if line.startswith(tuple(f"| {head} |" for head in models.HEADS))
    ]


def read(page: Path = PAGE) -> tuple[str, dict[str, str], dict[str, str]]:
    """Version, rows of the first two tables by family, and reason and place of refused families."""
    text = page.read_text() if page.exists() else ""
    version = re.search(r"transformers ([\w.]+);", text)
    known, refused = {}, {}
    for line in re.findall(r"^\| .*\|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0] != "reason":
            for name in cells[2].split(", "):
                refused[name] = cells[0]
        elif len(cells) != 3 and cells[0] not in ("family", "model", "head", *models.HEADS):
            known[cells[0]] = line
    return version[1] if version else "", known, refused


def write(
    known: dict[str, str],
    refused: dict[str, tuple[str, str]],
    heads: list[str],
    tps: list[int],
    page: Path = PAGE,
) -> None:
    """The page, of rows of families that are not refused and of reasons of the others."""
    text = HEAD.format(version=transformers.__version__, tps=" and on ".join(map(str, tps)))
    pictures = set(vision.FAMILIES)
    for title, cells, names in (
        (EXACT, 4, known.keys() - pictures),
        (VISION, 4, known.keys() & pictures),
        (WRONG, 2, known.keys()),
    ):
        rows = [known[name] for name in sorted(names) if known[name].count("|") == cells + 1]
        text += title.format(count=len(rows)) + "\n".join(rows) + "\n" if rows else ""
    text += OTHERS + "".join(f"{line}\n" for line in heads)
    reasons: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    for family, (reason, place) in sorted(refused.items()):
        reasons.setdefault(reason, []).append(family)
        places.setdefault(reason, place)
    text += REFUSED.format(count=len(refused))
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        text += f"| {reason} | `{places[reason]}` | {', '.join(names)} |\n"
    page.write_text(text)


def main() -> int:
    """Check the families that were asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; all if none are named")
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--heads", action="store_true", help="classes with another head")
    parser.add_argument("--dry-run", action="store_true", help="leave the page alone")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    transformers.logging.set_verbosity_error()
    verdicts = {family: verdict(family) for family in everyone()}
    refused = {family: found for family, found in verdicts.items() if found[0]}
    _, known, _ = read()
    known = {family: line for family, line in known.items() if verdicts.get(family) == ("", "")}
    ranks, bad, started = [Ranks(tp) for tp in arguments.tp], 0, time.monotonic()
    asked = arguments.families or ([] if arguments.heads else everyone())
    for family in asked:
        if verdicts[family][0]:
            print(f"{family:<26} refused: {verdicts[family][0]}")
            continue
        before = time.monotonic()
        kind, known[family] = row(family, *ranks)
        bad += kind != "exact"
        print(f"{time.monotonic() - before:5.1f} s  {kind:<6} {known[family]}", flush=True)
        if not arguments.dry_run:
            # What is interrupted keeps what it has found.
            write(known, refused, read_heads(), arguments.tp)
    heads = read_heads()
    if arguments.heads:
        heads = [head_row(head, ranks[0]) for head in models.HEADS]
    for some in ranks:
        some.close()
    if not arguments.dry_run:
        write(known, refused, heads, arguments.tp)
    print(f"{time.monotonic() - started:.0f} s")
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
