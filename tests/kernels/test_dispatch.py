"""Who takes a tensor: kernels or torch; how rows are walked; the table."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_sp.kernels import launch as dispatch
from hf_sp.kernels import layout, rms_norm, table
from tests.kernels.bare import BARE

ROOT = Path(__file__).resolve().parents[2]


class Subclass(torch.Tensor):
    pass


X = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("tensors", "answer"),
    [
        ([X], True),
        ([X, None, torch.nn.Parameter(X)], True),
        ([X.bfloat16(), X.half()], True),
        ([X.double()], False),
        ([X.long()], False),
        ([X[:0]], False),
        ([torch.ones(())], False),
        ([X.as_subclass(Subclass)], False),
        ([X.to("meta")], False),
        ([X, X.to("meta")], False),
    ],
)
def test_usable(tensors, answer, monkeypatch):
    assert dispatch.usable(*tensors) is answer
    monkeypatch.setattr(dispatch, "interpreter", None)
    assert not dispatch.usable(*tensors)


def test_fake_tensors_are_not():
    with FakeTensorMode():
        assert not dispatch.usable(torch.ones(2, 4))


def test_limits():
    wide = torch.ones(1, table.MAX_FORWARD)
    assert dispatch.norm_kernels(wide, None) is not None
    assert dispatch.norm_kernels(wide, None, backward=True) is None
    assert dispatch.norm_kernels(torch.ones(1, table.MAX_FORWARD + 1), None) is None
    assert dispatch.swiglu_kernels("silu", X, X.half()) is None


def test_a_triton_that_does_not_import_is_no_triton(monkeypatch):
    dispatch._has_triton.cache_clear()
    monkeypatch.setitem(sys.modules, "triton.language", None)
    assert not dispatch.usable(X)
    rms_norm(X, None, 1e-6)
    monkeypatch.undo()
    dispatch._has_triton.cache_clear()


SCRIPT = (
    BARE
    + """
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton" and sys.argv[1] == "without":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
import torch
before = {name for name in sys.modules if name.startswith("triton")}
import hf_sp.kernels, hf_sp.kernels.launch
y = hf_sp.kernels.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6)
z = hf_sp.kernels.swiglu(y, y)
assert not {n for n in sys.modules if n.startswith(("triton", "hf_sp.kernels.norm_t"))} - before
print("done")
"""
)


@pytest.mark.parametrize("mode", ["with", "without"])
def test_torch_needs_no_triton_and_imports_none(mode, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.stdout == "done\n", run.stderr


def walked(walk, which):
    """Offsets of all rows of one tensor, in the order of the walk."""
    outer, inner = walk.strides[which]
    return [r // walk.inner * outer + r % walk.inner * inner for r in range(walk.count)]


def offsets(x):
    """Offset of each row by its index."""
    sizes = [range(size) for size in x.shape[:-1]]
    return {
        index: sum(i * step for i, step in zip(index, x.stride(), strict=False))
        for index in itertools.product(*sizes)
    }


def views():
    base = torch.empty(3, 4, 2, 8)
    yield base
    yield base.transpose(0, 1)
    yield base.permute(2, 0, 1, 3)
    yield base[:, :, :1]
    yield base[:, ::2]
    yield base[:1, :, 0]
    yield torch.empty(3, 4, 24)[..., 8:16]
    yield torch.empty(3, 1, 8).expand(3, 5, 8)
    yield torch.empty(8)
    yield torch.empty(1, 1, 8)


@pytest.mark.parametrize("x", list(views()), ids=lambda x: f"{tuple(x.shape)}{x.stride()}")
def test_rows_of_one_tensor_and_its_like(x):
    like = torch.empty_like(x)
    walk = layout.rows_of([x, None, like, like[..., 0]], x)
    assert walk is not None
    assert walk.count == x.numel() // x.shape[-1]
    mine, theirs = offsets(x), offsets(like)
    # The same rows of both, each once.
    pairs = sorted(zip(walked(walk, 0), walked(walk, 2), strict=True))
    assert pairs == sorted((mine[i], theirs[i]) for i in mine)
    assert walked(walk, 1) == walked(walk, 0)


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 3, 4, 8)])
def test_rows_of_every_pair_of_orders(shape):
    dims = range(len(shape) - 1)
    orders = [
        torch.zeros([shape[d] for d in order] + [8]).permute(
            *[order.index(d) for d in dims], len(shape) - 1
        )
        for order in itertools.permutations(dims)
    ]
    for x, y in itertools.product(orders, orders):
        assert x.shape == y.shape == shape
        walk = layout.rows_of([x, y], x)
        if walk is None:
            assert len(shape) > 3
            a, b = layout.readable(x, y)
            walk = layout.rows_of([a, b], a)
            assert a is x
            assert torch.equal(b, y)
        else:
            a, b = x, y
        mine, theirs = offsets(a), offsets(b)
        pairs = sorted(zip(walked(walk, 0), walked(walk, 1), strict=True))
        assert pairs == sorted((mine[i], theirs[i]) for i in mine)


def test_full_tensors_are_one_level():
    x = torch.empty(5, 3, 8).transpose(0, 1)
    walk = layout.rows_of([x, torch.empty_like(x)], x)
    assert (walk.count, walk.inner) == (15, 1)


@pytest.mark.parametrize("n", [1, 17, 64, 128, 256, 257, 1000, 2048, 4096, 5120, 8192, 16384])
def test_table(n):
    width = table.next_power_of_2(n)
    assert width // 2 < n <= width
    for config in (table.norm_forward(n), table.norm_backward(n)):
        assert config.warps in (4, 8, 16)
        assert config.rows == table.next_power_of_2(config.rows), "a tile's side is a power of two"
        assert config.rows * width <= max(4096, width)
    assert table.norm_backward(n).stages == 2
