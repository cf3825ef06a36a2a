"""Products over experts: torch's grouped kernel, with padding, and the loop give the same."""

from __future__ import annotations

import pytest
import torch

from hf_sp.moe import grouped


def _operands(rows: list[int], inside: int, outside: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    groups = grouped.Groups(torch.tensor(rows).cumsum(0).to(torch.int32))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    total = sum(rows)
    return random(total, inside), random(total, outside), random(len(rows), outside, inside), groups


@pytest.mark.parametrize("rows", [[3, 5], [0, 8, 0, 1], [7]])
@pytest.mark.parametrize(("inside", "outside"), [(16, 8), (12, 24), (10, 6)])
@pytest.mark.parametrize("kernel", [False, True])
def test_products_are_those_of_each_expert(rows, inside, outside, kernel, monkeypatch):
    """The kernel, which runs on a CPU too; sizes whose rows are no multiple of 16 bytes apart."""
    dtype = torch.bfloat16 if kernel else torch.float64
    if kernel:
        monkeypatch.setattr(grouped, "_suits", lambda x: True)
    x, dy, weight, groups = _operands(rows, inside, outside, dtype)
    found = (
        grouped.grouped_linear(x, weight, groups),
        grouped.grouped_input_gradient(dy, weight, groups),
        grouped.grouped_weight_gradient(dy, x, groups),
    )
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    wide = [t.double() for t in (x, dy, weight)]
    wanted = (
        torch.einsum("ri,roi->ro", wide[0], wide[2][owner]),
        torch.einsum("ro,roi->ri", wide[1], wide[2][owner]),
        torch.zeros(len(rows), outside, inside, dtype=torch.float64).index_add_(
            0, owner, torch.einsum("ro,ri->roi", wide[1], wide[0])
        ),
    )
    # bfloat16 keeps 8 bits of a sum of at most 24 terms of size one.
    tolerance = 0.05 if kernel else 1e-12
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_no_rows_at_all():
    x, dy, weight, groups = _operands([0, 0], 4, 6, torch.float64)
    assert grouped.grouped_linear(x, weight, groups).shape == (0, 6)
    assert not grouped.grouped_weight_gradient(dy, x, groups).any()
