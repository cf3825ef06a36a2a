"""The private names of torch that hf_sp stands on, as it uses them, all in one place."""

from __future__ import annotations

import ast
import copy
import pickle
import unittest.mock
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hf_sp import torch_private as private
from hf_sp.estimate import fake_world
from hf_sp.torch_packed import is_packed, packed_shard, packed_sizes

PACKAGE = Path(private.__file__).parent
# Private names of others that may stand outside torch_private.py: each with the file that uses it.
# integrations/ and adapters/ have tables and tests of their own for what they stand on.
ELSEWHERE = {
    "comm/watch.py": {"_current_frames", "_exit"},
    "checks.py": {"_hf_hook"},
    "estimate/accounting.py": {
        "_c10d_functional",
        "_c10d_functional_autograd",
        "_cdata",
        "_guards",
        "_python_dispatch",
        "_pytree",
    },
    "loading.py": {"_apply"},
    "estimate/simulate.py": {"_internal", "_subclasses"},
    "model/forward.py": {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks",
        "_forward_pre_hooks",
    },
    "model/head.py": {"_backward_hooks", "_backward_pre_hooks"},
    "model/mlp.py": {
        "_backward_hooks",
        "_backward_pre_hooks",
        "_forward_hooks",
        "_forward_pre_hooks",
    },
    "model/norm.py": {"_forward_hooks"},
    "model/ports.py": {"_base"},
    "moe/grouped.py": {"_grouped_mm"},
    "state.py": {"_orig_mod"},
}
# What a module is made of, and what namedtuples call their methods.
EVERYWHERE = {"_parameters", "_buffers", "_modules", "_asdict", "_replace"}


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


def test_timeout_of_a_group_that_is_there():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for group in (None, dist.new_group([0])):
            private.set_timeout(group, timedelta(seconds=7))
            backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
            assert backend.options._timeout == timedelta(seconds=7)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("interface", ["", "lo"])
def test_a_group_of_gloo_has_one_thread(interface, monkeypatch):
    """Two write into one string without a lock: torch's own number, two, is the fault."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group([0], timeout=timedelta(seconds=7))
        options = [g._get_backend(torch.device("cpu")).options for g in (dist.group.WORLD, group)]
        assert [o._threads for o in options] == [1, 1]
        assert [len(o._devices) for o in options] == [1, 1]
        assert options[1]._timeout == timedelta(seconds=7)
        assert isinstance(group._get_backend(torch.device("cpu")), dist.ProcessGroupGloo)
        theirs = dist.ProcessGroupGloo._Options()
        assert theirs._threads == 2, "torch has changed: is the mend still needed?"
    finally:
        dist.destroy_process_group()


def test_numbers_are_whole():
    """A norm that lives as two parts; torch's own item() reads one of them."""
    with fake_world(2, rank=1) as mesh:
        private.read_whole_numbers()
        placed = DTensor.from_local(torch.tensor(3.0), mesh, [Replicate()])
        assert placed.item() == 3.0
        part = DTensor.from_local(torch.tensor(3.0), mesh, [Partial()])
        whole = torch.tensor(7.0)
        with unittest.mock.patch.object(DTensor, "full_tensor", return_value=whole):
            assert (part.item(), float(part)) == (7.0, 7.0)


def test_random_numbers_and_data_of_shards():
    def draw(op, args, kwargs):
        args[0].to_local().fill_(op(torch.ones(1), *args[1:], **kwargs).shape[0])
        return args[0]

    def laid_out(x, value):
        return DTensor.from_local(value[:2], x.device_mesh, x.placements)

    handlers, data = DTensor._op_dispatcher._custom_op_handlers, vars(DTensor).get("data")
    with fake_world(2, rank=1) as mesh, unittest.mock.patch.dict(handlers, clear=True):
        if data is not None:
            del DTensor.data
        try:
            private.draw_by(draw)
            private.set_data_by(laid_out)
            x = DTensor.from_local(torch.zeros(2), mesh, [Shard(0)])
            assert x.normal_().to_local().tolist() == [1.0, 1.0]
            assert x.uniform_(0, 1).to_local().tolist() == [1.0, 1.0]
            x.data = torch.arange(4.0)
            assert x.data.to_local().tolist() == x.to_local().tolist() == [0.0, 1.0]
        finally:
            del DTensor.data
            if data is not None:
                DTensor.data = data


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


def test_views():
    x = torch.ones(2, 3)
    assert private.is_view(x[:1])
    assert not private.is_view(torch.cat([x, x]))


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


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith(("__", "_hf_sp_"))


def _made(tree: ast.AST) -> set[str]:
    """Names that this code gives to something itself."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if getattr(node.value, "id", "") == "self" else set()
    return names


def _used(tree: ast.AST) -> set[str]:
    """Private names that are read: attributes, imports, and strings, as for getattr."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and str(node.value).isidentifier():
            names.add(str(node.value))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            dotted = [alias.name for alias in node.names]
            dotted += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names |= {part for one in dotted for part in one.split(".")}
    return {name for name in names if _private(name)}


def test_they_stand_in_one_place():
    """Both ways: a name that is new, and a name in the table that nobody uses any more."""
    trees = {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text())
        for path in PACKAGE.rglob("*.py")
    }
    ours = set().union(*map(_made, trees.values()))
    found = {
        file: names
        for file, tree in trees.items()
        if file not in ("torch_private.py", "torch_packed.py", "torch_attention.py")
        and not file.startswith(("integrations/", "adapters/"))
        if (names := _used(tree) - ours - EVERYWHERE)
    }
    assert found == ELSEWHERE


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("import torch._dynamo", {"_dynamo"}),
        ("from torch.utils import _pytree as pytree", {"_pytree"}),
        ("torch.ops._c10d_functional.all_reduce(x)", {"_c10d_functional"}),
        ("torch.nn.functional._grouped_mm(x, y)", {"_grouped_mm"}),
        ("getattr(module, '_forward_hooks')", {"_forward_hooks"}),
        ("x.__class__, x._hf_sp_state, x.data", set()),
    ],
)
def test_private_names_are_seen(source, want):
    assert _used(ast.parse(source)) == want


def test_packed_shard():
    """Part r of each half on rank r; torn apart and put together by DTensor itself."""
    full = torch.arange(3 * 8 * 2).view(3, 8, 2)
    with fake_world(2) as mesh:
        placement = packed_shard(1)
        found = distribute_tensor(full, mesh, (placement,), src_data_rank=None)
        gate, up = full.chunk(2, 1)
        assert torch.equal(found.to_local(), torch.cat([gate[:, :2], up[:, :2]], 1))
        assert torch.zeros_like(found).placements == (placement,)
    assert is_packed(placement)
    assert not is_packed(Shard(1))


def test_packed_parts_of_several_sizes():
    """As halves; and the results of operators are still laid out so, optimizers' too."""
    full = torch.arange(16 * 2.0).view(16, 2)
    with fake_world(2) as mesh:
        placement, other = (packed_shard(0, sizes) for sizes in ((4, 4, 8), (8, 4, 4)))
        assert placement != other
        assert placement != packed_shard(0, (1, 1, 1, 1))
        found = distribute_tensor(full, mesh, (placement,), src_data_rank=None)
        want = torch.cat([part.chunk(2)[0] for part in full.split([4, 4, 8])])
        assert torch.equal(found.to_local(), want)
        for x in (found * 2 + 1, torch.zeros_like(found).add_(found), copy.deepcopy(found)):
            assert x.placements == (placement,)
        p = torch.nn.Parameter(found)
        p.grad = torch.zeros_like(found)
        optimizer = torch.optim.AdamW([p])
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].placements == p.placements == (placement,)
    assert pickle.loads(pickle.dumps(placement)) == placement
    assert packed_sizes(placement.split_factor, 32) == [8, 8, 16]


def test_flattened_axes_are_known_to_the_mesh():
    """DTensor reduces over all axes at once where the mesh has them as one."""
    with fake_world(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        private.flatten(mesh)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for users: keep what _flatten returns
            assert mesh["dp_shard_tp"].size() == 4
        private.flatten(mesh["tp"])
