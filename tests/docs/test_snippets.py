"""Every block of code of these pages runs, and their tables name what there is."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from harness.pool import pool

from docs import jobs
from hf_sp.commands.main import parser
from hf_sp.integrations.optimizers import RIGHT

DOCS = Path(__file__).resolve().parents[2] / "docs"
PACKAGE = DOCS.parent / "hf_sp"
PAGES = ("start", "migrating", "parameters", "generation")
NEW = (*PAGES, "degrees", "troubleshooting", "memory", "estimate")


def _blocks(page: str, language: str) -> list[str]:
    text = (DOCS / f"{page}.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_code_runs(name, tmp_path):
    first, second = pool(2).run(jobs.page, blocks=_blocks(name, "python"), folder=str(tmp_path))
    assert _blocks(name, "python")
    if name == "start":
        assert "agrees with the unsharded model" in first["printed"]
        assert "TP block: all-gather on entry" in first["printed"]
    if name == "parameters":
        assert first["row"] == 0
        a, b = first["printed"].split("\n")[-2].split()
        assert float(a) == float(b) > 1
    if name == "migrating":
        assert first["plain"]
    if name == "generation":
        assert first["tokens"] == second["tokens"]
        assert len(first["tokens"][0]) == 9 + 8


@pytest.mark.parametrize("name", NEW)
def test_commands_are_such(name):
    """Each line is one that the command line takes."""
    for line in "".join(_blocks(name, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["hf-sp"]:
            assert parser().parse_args(words[1:]).run
        else:
            assert words[:1] in (["python"], ["torchrun"]), line


def test_errors_are_ours_where_it_says_so():
    sources = "".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))
    table = (DOCS / "troubleshooting.md").read_text()
    texts = re.findall(r"^\| `([^`]+)`( \(torch\))? \|", table, re.MULTILINE)
    assert len(texts) > 10
    assert [text for text, torch in texts if not torch and text not in sources] == []


def test_optimizers_of_trainer_are_known():
    text = (DOCS / "parameters.md").read_text()
    for name in ("schedule-free", "GrokAdamW", "GaLore", "RMSprop", "Adagrad", "SGD"):
        assert name in text
        assert any(name.lower().replace("-", "_") in one for one in RIGHT)
