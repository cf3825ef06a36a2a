"""The private names of torch that hf_sp stands on, as it uses them, all in one place."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hf_sp import torch_private as private
from hf_sp.estimate import fake_world

PACKAGE = Path(private.__file__).parent
# Apart, each with the reason in the module: the estimate's simulation, and the rendezvous store.
ELSEWHERE = {"estimate/accounting.py", "estimate/simulate.py", "checkpoint/weights.py"}


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("all_gather_into_tensor", "(Tensor input, int group_size, {group} group_name) -> Tensor"),
        (
            "reduce_scatter_tensor",
            "(Tensor input, str reduce_op, int group_size, {group} group_name) -> Tensor",
        ),
        ("all_reduce", "(Tensor input, str reduce_op, {group} group_name) -> Tensor"),
        (
            "all_to_all_single",
            "(Tensor input, SymInt[] output_split_sizes, SymInt[] input_split_sizes, "
            "{group} group_name) -> Tensor",
        ),
        ("wait_tensor", "(Tensor tensor) -> Tensor"),
    ],
)
def test_functional_collectives_keep_their_signature(name, schema):
    found = str(getattr(private.collective_ops, name).default._schema)
    wanted = {f"_c10d_functional::{name}{schema.format(group=g)}" for g in ("str", "Any")}
    assert found in wanted


def test_graph_task_tells_backward_passes_apart():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(private.graph_task()))
    for _ in range(2):
        y.sum().backward(retain_graph=True)
    assert private.graph_task() == -1
    assert len(set(seen)) == 2
    assert -1 not in seen


def test_process_group_by_name():
    with fake_world(2, rank=1) as mesh:
        group = mesh.get_group()
        found = private.process_group(group.group_name)
        assert (found.group_name, found.size(), found.rank()) == (group.group_name, 2, 1)


def test_device_assert():
    private.device_assert(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not so"):
        private.device_assert(torch.tensor(False), "not so")


def test_fake_tensors_and_real_ones_among_them():
    with FakeTensorMode():
        assert private.is_fake(torch.ones(1))
        with private.real_tensors():
            assert not private.is_fake(torch.ones(1))
    assert private.is_fake(torch.ones(1, device="meta"))


def test_same_storage():
    x = torch.ones(4)
    assert private.same_storage(x, x[1:])
    assert not private.same_storage(x, x.clone())


def test_version():
    x = torch.ones(2)
    before = private.version(x)
    x.add_(1)
    assert private.version(x) != before
    with torch.inference_mode():
        assert private.version(torch.ones(1)) is None


def test_stand_in_and_torch_function():
    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "mine"

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError

    x = private.stand_in(Mine, (2, 3), torch.ones(1, dtype=torch.float16))
    assert x.sum() == "mine"
    with private.without_torch_function():
        assert (x.shape, x.dtype) == ((2, 3), torch.float16)


def test_gradient_hooks():
    x = torch.ones(2, requires_grad=True) * 2
    assert not private.has_gradient_hooks(x)
    x.register_hook(lambda grad: None)
    assert private.has_gradient_hooks(x)
    y = torch.ones(2, requires_grad=True) * 2
    y.retain_grad()
    assert private.has_gradient_hooks(y)


def test_global_hooks():
    module = torch.nn.modules.module
    assert not private.has_global_hooks()
    for register in (
        module.register_module_forward_hook,
        module.register_module_forward_pre_hook,
        module.register_module_full_backward_hook,
        module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *args: None)
        assert private.has_global_hooks()
        handle.remove()
    assert not private.has_global_hooks()


def test_they_stand_in_one_place():
    pattern = re.compile(r"torch\._(?!distributed)|torch\.ops\._|\._cdata|from torch\._")
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if pattern.search(path.read_text())
    }
    assert found - ELSEWHERE == {"torch_private.py"}


def test_packed_halves():
    """Part r of each half on rank r; torn apart and put together by DTensor itself."""
    full = torch.arange(3 * 8 * 2).view(3, 8, 2)
    with fake_world(2) as mesh:
        placement = private.packed_halves(1)
        found = distribute_tensor(full, mesh, (placement,), src_data_rank=None)
        gate, up = full.chunk(2, 1)
        assert torch.equal(found.to_local(), torch.cat([gate[:, :2], up[:, :2]], 1))
        assert torch.zeros_like(found).placements == (placement,)
    assert private.is_packed(placement)
    assert not private.is_packed(Shard(1))


def test_flattened_axes_are_known_to_the_mesh():
    """DTensor reduces over all axes at once where the mesh has them as one."""
    with fake_world(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        private.flatten(mesh)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for users: keep what _flatten returns
            assert mesh["dp_shard_tp"].size() == 4
        private.flatten(mesh["tp"])
