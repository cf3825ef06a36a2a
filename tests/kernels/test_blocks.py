"""Row blocks change no bit of what is row by row, and sum the rest in order."""

from __future__ import annotations

import pytest
import torch

from hf_sp.kernels.blocks import by_blocks


def _run(x, scale, extra):
    return x * scale.unsqueeze(-1), None if extra is None else extra + 1, scale + 1, x.sum(0)


@pytest.mark.parametrize("block", [1, 7, 24, 100, 10**6])
@pytest.mark.parametrize("given", [True, False])
def test_two_dimensions(block, given):
    # As many rows as columns: what is summed must not be taken for rows.
    x, scale = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    extra = torch.randn(12, 12).double() if given else None
    calls = []

    def run(*rows):
        calls.append(rows[0].shape[0])
        return _run(*rows)

    got = by_blocks(run, x, scale, extra, summed=1, block=block)
    want = _run(x, scale, extra)
    assert sum(calls) == 12
    assert len(calls) == max(1, -(-144 // max(12, block // 12 * 12)))
    for mine, theirs in zip(got[:3], want[:3], strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    # Another order of a sum of 12 numbers of size 1 to 10.
    assert torch.allclose(got[3], want[3], rtol=0, atol=12 * 10 * 2**-53)


def test_layout_and_dtype():
    x = torch.randn(6, 2, 4).transpose(0, 1)  # sequence-major
    (y,) = by_blocks(lambda x: (x.to(torch.bfloat16),), x, block=8)
    assert torch.equal(y, x.to(torch.bfloat16))
    assert y.stride() == x.stride()
