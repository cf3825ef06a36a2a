"""``hf-sp doctor``: what is bad is named with its remedy, and ends with status 1."""

from __future__ import annotations

import json

import pytest

from hf_sp.commands import doctor
from hf_sp.commands.main import main


def _levels(env):
    return {f.what: f for f in [*doctor.launcher(env), *doctor.environment(env)]}


@pytest.mark.parametrize(
    ("env", "what", "level", "remedy"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "launcher", "bad", "torchrun"),
        ({"PARALLELISM_CONFIG_SP_SIZE": "2"}, "PARALLELISM_CONFIG_SP_SIZE", "bad", "tp_size"),
        ({"ACCELERATE_USE_FSDP": "true"}, "accelerate's FSDP or DeepSpeed plugin", "bad", "dp_sh"),
        ({"LOCAL_WORLD_SIZE": "4096"}, "OMP_NUM_THREADS", "note", "OMP_NUM_THREADS=1"),
    ],
)
def test_known_bad(env, what, level, remedy):
    found = _levels(env)[what]
    assert found.level == level
    assert remedy in found.remedy


def test_a_time_that_is_none(monkeypatch):
    variable = next(iter(doctor.TIMES))
    monkeypatch.setenv(variable, "soon")
    found = _levels({variable: "soon"})[variable]
    assert found.level == "bad"
    assert found.remedy


def test_nothing_bad_in_an_empty_environment():
    assert {f.level for f in _levels({}).values()} <= {"ok", "note"}


def test_versions_outside_the_tested_range(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "999.0")
    found = {f.what: f for f in doctor.versions()}
    assert found["torch"].level == "note"
    assert "999.0" in found["torch"].found
    assert "constraints.txt" in found["torch"].remedy


@pytest.mark.parametrize("bad", [False, True])
def test_the_command(capsys, monkeypatch, bad):
    if bad:
        monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    with pytest.raises(SystemExit, match="1" if bad else "0"):
        main(["doctor", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["healthy"] is not bad
    assert {"torch", "transformers", "launcher"} <= {f["what"] for f in answer["findings"]}
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "hf-sp doctor" in capsys.readouterr().out
