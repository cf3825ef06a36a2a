"""docs/families.md is what this hf_sp says of the transformers that it was written with."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from scripts import families

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_not_stale():
    """Families, verdicts and reasons; seconds, for no model is built with memory."""
    version, known, refused = families.read()
    # The page is of the newest tested version; only another one that is installed may skip.
    assert f"transformers=={version}\n" in (ROOT / "constraints.txt").read_text()
    if version != transformers.__version__:
        pytest.skip(f"docs/families.md is of transformers {version}")
    verdicts = {family: families.verdict(family) for family in families.everyone()}
    how = "python scripts/families.py"
    assert {f: reason for f, (reason, _) in verdicts.items() if reason} == refused, how
    assert sorted(known) == sorted(f for f, (reason, _) in verdicts.items() if not reason), how


def test_no_family_that_is_not_refused_differs():
    _, known, _ = families.read()
    assert len(known) >= 60
    assert not [line for line in known.values() if line.count("|") != 5]
