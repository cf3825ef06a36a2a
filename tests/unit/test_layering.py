"""Imports go one way, and files stay short. Read from the source; nothing is imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hf_sp"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300
# Longer today; the list may only get shorter, and so may the files.
LONGER = {}
# The package in all, and the attributes that it leaves on modules and tensors of others. It was
# 11,741 before checkpoints had a manifest, Trainer data parallel ranks, hf-sp its commands and
# families plans of our own.
MAX_LINES_OF_ALL = 23_900
MAX_ATTRIBUTES = 8

# The one table. A module may import its own layer and those below; siblings of one row in separate
# groups are blind to each other (plan knows no collectives, mesh no kernels).
LAYERS: list[list[set[str]]] = [
    [
        {
            "errors",
            "torch_private",
            "torch_packed",
            "torch_attention",
            "patching",
            "versions",
            "gloo",
        }
    ],
    [{"plan"}, {"comm"}],
    [{"kernels"}, {"state"}],
    [{"model"}],
    [{"moe"}, {"context"}],
    [{"install", "checkpoint", "optimizer_state"}, {"checks", "checks_fsdp"}],
    [{"adapters"}],
    [{"integrations", "api", "consolidate", "loading"}],
    [{"proof"}],
    [{"commands", "__main__"}],
]
# What stands apart: name -> all it may import of ours. The estimator measures a model that it is
# handed; it must not know how the model was made parallel.
APART = {"estimate": {"errors", "gloo"}}
# May import less than all that is below: a plan is derived from a model and its source alone.
LESS = {"plan": {"errors"}}
# The package's own __init__ gathers the public names from anywhere; only the top layer may import
# from it.
ROOT = "__init__"

FORBIDDEN_OUTSIDE_INTEGRATIONS = (
    "accelerate",
    "peft",
    "trl",
    "transformers.trainer",
    "transformers.Trainer",
)


def _name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _layer(top: str) -> tuple[int, int] | None:
    for level, groups in enumerate(LAYERS):
        for group, names in enumerate(groups):
            if top in names:
                return level, group
    return None


def imports(tree: ast.AST, module: str) -> set[str]:
    """Absolute dotted names of all imports, also those inside functions.

    `from a import b` gives a and a.b.
    """
    found = set()
    package = ["hf_sp", *module.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return found


def violations(source: str, module: str) -> list[str]:
    """What `module` (dotted, without hf_sp) imports against the rules."""
    top = module.split(".")[0]
    names = imports(ast.parse(source), module)
    bad = []
    if top not in ("integrations", "adapters"):
        for name in sorted(names):
            if any(name == f or name.startswith(f + ".") for f in FORBIDDEN_OUTSIDE_INTEGRATIONS):
                bad.append(
                    f"{module} imports {name}: only hf_sp.integrations and hf_sp.adapters may"
                )
    if module == ROOT:
        return bad
    own = _layer(top)
    if own is None and top not in APART:
        return [*bad, f"{module}: not in the table of layers"]
    for name in sorted(n for n in names if n.startswith("hf_sp.")):
        other = name.split(".")[1]
        if other == top:
            continue
        allowed = APART.get(top)
        if allowed is not None:
            if other not in allowed:
                bad.append(f"{module} imports hf_sp.{other}: it may import {sorted(allowed)} only")
        elif other in APART:
            if own is None or own[0] < len(LAYERS) - 2:
                bad.append(f"{module} imports hf_sp.{other}: only the top layers may")
        else:
            target = _layer(other)
            if target is None:
                if own[0] < len(LAYERS) - 1:
                    bad.append(
                        f"{module} imports {name}: from the package itself, only the top layer may"
                    )
            elif target[0] > own[0] or (target[0] == own[0] and target[1] != own[1]):
                bad.append(f"{module} imports hf_sp.{other}, which is above it")
            elif other not in LESS.get(top, {other}):
                bad.append(
                    f"{module} imports hf_sp.{other}: it may import {sorted(LESS[top])} only"
                )
    return bad


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_go_one_way(path):
    module = _name(path).removesuffix(".__init__")
    assert violations(path.read_text(), module) == []


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_file_is_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGER.get(_name(path), MAX_LINES), f"{lines} lines; split it by what it owns"


def test_files_that_are_longer_are_still_there():
    lines = {_name(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name for name in LONGER if lines.get(name, 0) <= MAX_LINES} == set()


def test_the_package_is_short():
    lines = sum(len(path.read_text().splitlines()) for path in MODULES)
    assert lines <= MAX_LINES_OF_ALL


def test_few_attributes_are_left_on_modules_and_tensors():
    found = set().union(*(re.findall(r"_hf_sp_\w+", path.read_text()) for path in MODULES))
    assert len(found) <= MAX_ATTRIBUTES, sorted(found)


def _circle(arrows: dict[str, set[str]]) -> list[str]:
    """Names that import each other in a circle; none if there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := visit(name, []))), [])


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions count too."""
    names = {_name(path).removesuffix(".__init__"): path for path in MODULES}
    arrows = {
        module: {
            name.removeprefix("hf_sp.")
            for name in imports(ast.parse(path.read_text()), module)
            if name.removeprefix("hf_sp.") in names
        }
        - {module}
        for module, path in names.items()
        if module != ROOT
    }
    assert _circle(arrows) == []


def test_a_circle_is_found():
    arrows = {"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}
    assert _circle(arrows) == ["b", "d"]
    assert _circle({"a": {"b"}, "b": set()}) == []


def test_the_package_is_seen():
    assert len(MODULES) > 10


@pytest.mark.parametrize(
    ("source", "module", "word"),
    [
        ("from hf_sp.api import parallelize", "model.linear", "above"),
        ("def f():\n    import hf_sp.model.shard", "plan.derive", "above"),
        ("from hf_sp.comm.collectives import Axis", "plan.derive", "above"),
        ("from hf_sp.torch_private import is_fake", "plan.derive", "only"),
        ("from hf_sp.plan import Plan", "comm.collectives", "above"),
        ("from hf_sp.kernels import rms_norm", "comm.collectives", "above"),
        ("from hf_sp.kernels import rms_norm", "state", "above"),
        ("from hf_sp.state import ParallelState", "kernels.norm", "above"),
        ("from ..moe import experts", "model.linear", "above"),
        ("from transformers import Trainer", "api", "integrations"),
        ("import accelerate.utils", "comm.mesh", "integrations"),
        ("from hf_sp.plan import Plan", "estimate.step", "only"),
        ("from hf_sp import estimate", "model.loss", "top layers"),
        ("from hf_sp import parallelize", "model.loss", "itself"),
        ("from hf_sp import parallelize", "estimate.step", "only"),
        ("", "novelty", "table"),
    ],
)
def test_the_rules_bite(source, module, word):
    found = violations(source, module)
    assert found, "not noticed"
    assert word in found[0]


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from hf_sp.comm.collectives import Axis\nfrom hf_sp.plan import Plan", "state"),
        ("from hf_sp.comm import collectives\nfrom hf_sp.errors import ShapeError", "kernels.norm"),
        ("from transformers import Trainer\nimport peft", "integrations.trainer"),
        ("from hf_sp.estimate import simulate", "commands.rank"),
    ],
)
def test_the_rules_allow(source, module):
    assert violations(source, module) == []
