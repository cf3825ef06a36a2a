"""Pieces of unequal width (an uneven vocabulary, down to empty ones), on real ranks."""

from __future__ import annotations

import pytest
import torch
from harness.pool import pool

from collectives import jobs


@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (1, 0)], ids=str)
def test_concat_slice(sizes):
    for y, whole, dx, want in pool(2).run(jobs.concat_slice, sizes=sizes):
        assert torch.equal(y, whole)
        assert torch.equal(dx, want)
