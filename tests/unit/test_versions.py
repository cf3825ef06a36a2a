"""One warning for versions that no test has run with, and the files that name versions agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from shutil import copy, copytree

import pytest

from hf_sp.versions import TESTED, untested, warn_if_untested

ROOT = Path(__file__).resolve().parents[2]


def _installed(monkeypatch, **versions):
    def version(package):
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)


def test_the_tests_themselves_run_in_range():
    assert untested() == []


@pytest.mark.parametrize(
    ("version", "fine"),
    [
        ("5.17.0", True),
        ("5.24.0", True),
        ("5.24.3", True),
        ("5.24.0.dev0", True),
        ("5.16.1", False),
        ("5.25.0.dev0", False),
        ("5.100", False),
        ("6.0.0", False),
        ("4.57.1", False),
        ("main", False),
        (None, False),
    ],
)
def test_range(monkeypatch, version, fine):
    _installed(monkeypatch, transformers=version, torch="2.13.0+cpu")
    assert untested() == ([] if fine else [f"transformers {version} (tested: 5.17 to 5.24)"])


def test_one_warning_for_all_and_only_for_what_is_installed(monkeypatch):
    _installed(monkeypatch, torch="2.15.0", transformers="5.24.0", peft="0.18.1")
    with pytest.warns(UserWarning, match="tested") as caught:
        warn_if_untested()
    assert [str(w.message) for w in caught] == [
        "hf_sp has not been tested with torch 2.15.0 (tested: 2.11 to 2.14), peft 0.18.1 (tested: "
        "0.21). It may work; if something fails, try a tested version first: README.md names them."
    ]


def test_one_rank_of_a_launch_warns(monkeypatch):
    _installed(monkeypatch, torch="2.15.0")
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()


def test_import_warns_once_and_goes_on(tmp_path):
    """Metadata that is found first, as of another version; the packages are the installed ones."""
    for package, version in {"transformers": "9.9.9", "trl": "0.1.0"}.items():
        folder = tmp_path / f"{package}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
    script = tmp_path / "mine.py"
    script.write_text("import hf_sp\nimport hf_sp.api\nprint(hf_sp.__version__)\n")
    done = _python(str(script), PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "hf_sp has not been tested" in line]
    assert line.startswith(f"{script}:1: UserWarning: ")
    assert "transformers 9.9.9 (tested: 5.17 to 5.24), trl 0.1.0 (tested: 1.16)" in line


def test_looking_imports_nothing():
    """What cannot be imported is to be named too."""
    done = _python(
        "-c",
        "import runpy, sys; runpy.run_path(sys.argv[1])['warn_if_untested'](); print(*sys.modules)",
        str(ROOT / "hf_sp/versions.py"),
    )
    assert done.returncode == 0, done.stderr
    assert set(TESTED) & set(done.stdout.split()) == set()


def _python(*args, **environment):
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )


def _pins(file):
    return dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / file).read_text(), re.MULTILINE))


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-floor.txt"])
def test_constraints_are_in_range(monkeypatch, file):
    _installed(monkeypatch, **_pins(file))
    assert untested() == []


def test_the_ends_of_the_range_are_pinned():
    pinned = {file: _pins(file) for file in ("constraints.txt", "constraints-floor.txt")}
    oldest, newest = TESTED["transformers"]
    assert pinned["constraints-floor.txt"]["transformers"].startswith(f"{oldest}.")
    assert pinned["constraints.txt"]["transformers"].startswith(f"{newest}.")


def test_what_pip_may_install_is_not_older_than_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["peft"], *extras["trl"]]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", one).groups() for one in wanted)
    for package, (oldest, _) in TESTED.items():
        assert floors[package].split(".")[:2] == oldest.split("."), package


def test_the_wheel_says_that_it_is_typed(tmp_path):
    """Built as pip builds it, from a copy: a build leaves files behind."""
    source = tmp_path / "source"
    copytree(ROOT / "hf_sp", source / "hf_sp")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = _python(*build, "--wheel-dir", str(tmp_path), str(source))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("hf_sp-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "hf_sp/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_sp").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
