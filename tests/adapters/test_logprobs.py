"""Per-token log-probabilities and statistics of the vocab-parallel head, and their gradients."""

from __future__ import annotations

import pytest
from harness.parity import assert_parity
from harness.pool import pool

from adapters import logprob_jobs


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "chunk": 1000},
        {"vocab": 5, "chunk": 1},
        {"temperature": 0.7, "scale": 0.5},
        {"cap": 2.0, "scale": 1.5, "temperature": 0.7},
    ],
    ids=str,
)
def test_token_statistics(tp, sharded, options):
    assert_parity(pool(tp).run(logprob_jobs.statistics, sharded=sharded, **options))
