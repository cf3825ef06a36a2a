"""The memory frontier changes no gradient, and hooks of users see what they would see.

The matrix runs the default (everything made again, kernels on). These are the other cells.
"""

from __future__ import annotations

import itertools

import pytest
from harness.parity import Case, assert_parity, train_all
from harness.pool import pool, run_once

from parity import recompute_jobs
from parity.recompute_jobs import USES

CASES = tuple(
    Case(family, sp, checkpoint=checkpoint, parallelize=options)
    for family, sp, checkpoint, options in [
        *itertools.product(
            ("llama_bias", "qwen3"),
            (True, False),
            ("none", "non_reentrant"),
            (
                (("recompute", "none"),),
                (("recompute", "norm"),),
                (("kernels", False),),
                (("kernels", False), ("recompute", "norm+act")),
            ),
        ),
        ("mistral", True, "reentrant", (("kernels", False),)),
        ("llama_tied", True, "reentrant", (("recompute", "norm"),)),
    ]
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c}-{dict(c.parallelize)}")
def test_the_frontier_changes_no_gradient(case):
    per_rank = run_once(2, train_all, timeout=180, cases=CASES)
    assert_parity([reports[CASES.index(case)] for reports in per_rank])


@pytest.mark.parametrize("name", USES)
def test_hooks_and_frozen_parts(name):
    per_rank = run_once(2, recompute_jobs.users, names=tuple(USES))
    assert_parity([reports[name] for reports in per_rank])


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, ["NormForward True", "SwiGLUForward True", "NormForward True"]),
        (
            {"recompute": "norm"},
            ["NormForward True", "SwiGLUForward False", "NormForward True"],
        ),
        (
            {"recompute": "none"},
            ["NormForward False", "SwiGLUForward False", "NormForward False"],
        ),
        ({"kernels": False}, ["NoneType"] * 3),
        (
            {"kernels": False, "recompute": "norm+act"},
            ["NormForward True", "SwiGLUForward True", "NormForward True"],
        ),
    ],
)
def test_what_stands_in(options, want):
    assert pool(2).run(recompute_jobs.forwards, **options) == [want, want]
