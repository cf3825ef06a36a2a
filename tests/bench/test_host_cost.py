"""The host's cost of a layer, as Python calls: they are exact, and times are not asserted."""

from __future__ import annotations

import pytest

from scripts.bench import host_cost

# Python calls of one layer, forward and backward, without those that compare DTensor specs: lower
# them with the code, never raise them.
AT_MOST = {"hf_sp": 826, "hf_sp-nosp": 724, "hf_sp-lora": 1612}


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("name", AT_MOST)
def test_python_calls_of_a_layer(name):
    with host_cost.contenders([name]) as steps:
        first, again = (host_cost.count_calls(steps)[name] for _ in range(2))
    for event in ("call", "c_call"):
        assert first[event] == again[event]
    assert first["call"].step <= AT_MOST[name]


def test_rows():
    """A row carries what its ratio is to; plain HF is as cheap as itself."""
    rows = {row.name: row for row in host_cost.measure(["peft"], rounds=2)}
    assert list(rows) == ["plain", "peft"]
    assert rows["plain"].to_base == rows["plain"].to_plain == 1
    assert rows["plain"].python_calls.backward == rows["peft"].python_calls.backward == 0
    assert rows["plain"].python_calls.step < rows["peft"].python_calls.step
    assert all(len(host_cost.cells(row)) == len(host_cost.HEADER) for row in rows.values())
