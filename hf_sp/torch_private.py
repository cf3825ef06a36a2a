"""The private names of torch that hf_sp stands on.

One place to look when torch changes; each says why it is needed and is held, with the versions
torch 2.11 to 2.14 in mind, by tests/unit/test_torch_private.py. Must not know hf_sp.

Not here: ``nn.Module._parameters`` and its kin, which every package that edits modules uses;
``adapters`` and ``integrations``, which have tables of their own; and the few names that stand
where they are used (``estimate``'s, hooks of modules), which that test lists by file.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec as DTensorSpec
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn.modules import module as _module
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

# What torch.distributed._functional_collectives is made of. The public wrappers are differentiable
# in a way of their own (all_reduce all-reduces again in backward), and the plain torch.distributed
# calls cannot be traced.
collective_ops = torch.ops._c10d_functional


def allow_graphs(count: int) -> None:
    """Let torch.compile keep that many graphs of one function, instead of 8.

    Decoder layers share their code, and torch guards on numbers that their hooks do not share.
    """
    # Here: it imports triton, which nobody needs who compiles nothing.
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, count)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, count)


def one_gloo_thread() -> None:
    """Let the process groups of gloo that are made from now on work with one thread instead of two.

    Both threads of a group write the name of what they have completed into one string, without a
    lock (torch 2.11 to 2.13, ``ProcessGroupStatus.lastCompletedWorkName``): a gather and a sum in
    turn corrupt the heap within minutes (docs/numerics.md). torch hands a group's options to NCCL
    alone. With one thread collectives run in the order in which they were launched.
    """
    if not dist.is_gloo_available():
        return
    gloo: Any = dist.ProcessGroupGloo
    original = gloo.__init__

    def init(self: Any, store: Any, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
        timeout = kwargs.get("timeout", args[0] if args else None)
        if isinstance(timeout, timedelta):
            # As torch: interfaces by name, else the one that the host's name leads to.
            names = [n for n in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if n]
            options = gloo._Options()
            options._devices = [gloo.create_device(interface=name) for name in names]
            options._devices = options._devices or [gloo.create_default_device()]
            options._threads = 1
            options._timeout = timeout
            args, kwargs = (options,), {}
        original(self, store, rank, size, *args, **kwargs)

    if original.__name__ != init.__name__:
        gloo.__init__ = init


def below_autograd() -> AbstractContextManager[Any]:
    """Call operators without their autograd kernels, which for collectives are Python."""
    return torch._C._AutoDispatchBelowAutograd()


def graph_task() -> int:
    """Number of the backward pass that is running, -1 outside of one."""
    return torch._C._current_graph_task_id()


def process_group(name: str) -> ProcessGroup:
    """The process group of that name; functional collectives know groups by name."""
    return _resolve_process_group(cast(Any, name))


def default_store(prefix: str = "") -> Any:
    """The store that the ranks met at: the only way to learn of a rank without a collective.

    With a prefix, a client of its own: who waits at another one does not keep it.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    return dist.distributed_c10d.PrefixStore(prefix, store.clone()) if prefix else store


def collectives_launched() -> int:
    """How many collectives this rank has launched so far, of all process groups."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def set_timeout(group: ProcessGroup | None, timeout: timedelta) -> None:
    """Let collectives of a group that is there already (None: the default) wait for that long."""
    _set_pg_timeout(timeout, group)


def device_assert(holds: Tensor, message: str) -> None:
    """Fail on the device if false, as torch's own kernels do, without a synchronisation."""
    torch._assert_async(holds, message)


def local_tensor(x: Any) -> Tensor:
    """The local tensor of a DTensor itself: no autograd node, and no gradient."""
    return x._local_tensor


def spec_of(x: Any) -> DTensorSpec:
    """Mesh, placements, shape and dtype of a DTensor."""
    return x._spec


def unpack(parameters: Iterable[Any]) -> tuple[list[Any], list[DTensorSpec | None]]:
    """Parameters' local values, without a gradient path, and what ``pack`` needs of DTensors."""
    values: list[Any] = []
    specs: list[DTensorSpec | None] = []
    for p in parameters:
        known = isinstance(p, DTensor)
        values.append(p._local_tensor if known else p if p is None else p.detach())
        specs.append(p._spec if known else None)
    return values, specs


def pack(grads: Iterable[Tensor | None], specs: Iterable[DTensorSpec | None]) -> list[Any]:
    """Local gradients as the gradients of the parameters that were unpacked."""
    return [
        grad if grad is None or spec is None else dtensor_of(grad, spec)
        for grad, spec in zip(grads, specs, strict=True)
    ]


def dtensor_of(x: Tensor, spec: DTensorSpec) -> DTensor:
    """The DTensor of that spec whose local tensor is x.

    What ``DTensor.from_local`` builds, without building the spec again, and without ``__init__``,
    which does nothing but call a decorator of torch.compile's.
    """
    x = x if x.is_contiguous() else x.contiguous()
    return DTensor.__new__(DTensor, x, spec, requires_grad=False)


def packed_shard(dim: int, sizes: Sequence[int] = (1, 1)) -> Placement:
    """Each of several tensors packed along ``dim`` split over the axis: part r of all on rank r.

    What DTensor calls strided sharding, for FSDP over TP; ``full_tensor()`` unpacks it rightly.
    ``sizes`` say how long the tensors are, relative to each other.
    """
    parts = _Parts([size // math.gcd(*sizes) for size in sizes])
    return _StridedShard(dim, split_factor=parts if len({*parts.sizes}) > 1 else len(sizes))


def is_packed(placement: Placement) -> TypeGuard[_StridedShard]:
    """Whether a placement is one of ``packed_shard``."""
    return isinstance(placement, _StridedShard)


def packed_sizes(split_factor: Any, size: int) -> list[int]:
    """How long the tensors are that a placement of ``packed_shard`` packs in a dim of that size."""
    sizes = split_factor.sizes if isinstance(split_factor, _Parts) else (1,) * split_factor
    return [part * size // sum(sizes) for part in sizes]


class _Parts(int):
    """A ``split_factor`` of tensors of several sizes; the number is that of the parts' units.

    DTensor makes placements anew for results of operators, of a dim and of this number.
    """

    sizes: tuple[int, ...]

    def __new__(cls, sizes: Sequence[int]) -> _Parts:
        self = super().__new__(cls, sum(sizes))
        self.sizes = tuple(sizes)
        return self


class _PackedShard(_StridedShard):
    """Strided sharding of tensors of several sizes: DTensor's, but for how a tensor is cut."""

    def __init__(self, dim: int, *, split_factor: _Parts) -> None:
        super().__init__(dim, split_factor=int(split_factor))
        self._parts = split_factor

    @property
    def split_factor(self) -> _Parts:  # type: ignore[override]
        return self._parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PackedShard) and other._what() == self._what()

    def _what(self) -> tuple[int, tuple[int, ...]]:
        return self.dim, self._parts.sizes

    def __hash__(self) -> int:
        return hash(self._what())

    def __repr__(self) -> str:
        return "_PackedShard(dim={}, sizes={})".format(*self._what())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return packed_shard, self._what()

    def _split_tensor(
        self, tensor: Tensor, num_chunks: int, *, with_padding: bool = True, contiguous: bool = True
    ) -> tuple[list[Tensor], list[int]]:
        whole = tensor.split(packed_sizes(self._parts, tensor.shape[self.dim]), self.dim)
        cut = [part.chunk(num_chunks, self.dim) for part in whole]
        # The plan divides: no rank has more than others.
        return [torch.cat(own, self.dim) for own in zip(*cut, strict=True)], [0] * num_chunks


def _new_placement(cls: Any, dim: Any = None, *, split_factor: Any = 1, **kwargs: Any) -> Any:
    # Python goes on to the __init__ of what it is given.
    return _new_strided(_PackedShard if isinstance(split_factor, _Parts) else cls)


_new_strided: Any = _StridedShard.__new__
setattr(_StridedShard, "__new__", _new_placement)  # noqa: B010 (no method to mypy)


@functools.cache
def allow_anomaly_mode() -> None:
    """Let ``torch.autograd.detect_anomaly`` ask the gradient of a DTensor whether it has a nan."""
    ask = register_sharding(torch.ops.aten._is_any_true.default)
    ask(lambda x: [([Replicate()], [Replicate()])])


def read_whole_numbers() -> None:
    """Let ``item()`` and ``float()`` of a DTensor give the whole value, on every rank.

    torch reads the local one, which of a norm or a sum is this rank's part. For all DTensors.
    """
    handlers: Any = DTensor._op_dispatcher._custom_op_handlers
    handlers.setdefault(torch.ops.aten._local_scalar_dense.default, _whole_number)


def _whole_number(op: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    x: Any = args[0]
    whole = all(p.is_replicate() for p in x.placements)
    with torch.no_grad():
        return op(x._local_tensor if whole else x.full_tensor())


def draw_by(draw: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Let that fill DTensors with random numbers, instead of each rank its own part by itself."""
    handlers: Any = DTensor._op_dispatcher._custom_op_handlers
    for op in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
        handlers.setdefault(op, draw)


def set_data_by(laid_out: Callable[[Any, Tensor], DTensor]) -> None:
    """Let ``p.data = value`` of a DTensor write, after laying the value out as p.

    torch writes the dtype and the shape that p shows, and not the values.
    """

    def write(p: Any, value: Tensor) -> None:
        value = laid_out(p, value)
        whole.__set__(p, value)
        p._local_tensor.data = local_tensor(value)

    if "data" not in vars(DTensor):
        whole: Any = vars(torch._C.TensorBase)["data"]
        setattr(DTensor, "data", property(whole.__get__, write))  # noqa: B010 (a Tensor to mypy)


def is_fake(x: Tensor) -> bool:
    """Whether x has no values (FakeTensorMode, meta)."""
    return isinstance(x, FakeTensor) or x.is_meta


def real_tensors() -> AbstractContextManager[Any]:
    """Make real tensors inside, under FakeTensorMode too: a mesh reads its table of ranks back."""
    return unset_fake_temporarily()


def flatten(mesh: DeviceMesh) -> None:
    """Let DTensor reduce over all axes of a mesh at once (the norm of gradients)."""
    if mesh.ndim > 1:
        mesh._flatten()


def version(x: Tensor) -> int | None:
    """How often x has been written to in place; None under inference mode, which does not count."""
    return None if x.is_inference() else x._version


def stand_in(cls: type[Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of a subclass with a shape, a dtype and a device, and no storage."""
    return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)


def without_torch_function() -> AbstractContextManager[Any]:
    """Operate on a subclass below its own ``__torch_function__``."""
    return torch._C.DisableTorchFunctionSubclass()


def has_gradient_hooks(x: Tensor) -> bool:
    """Whether someone watches the gradient that flows into x."""
    return bool(x._backward_hooks) or x.retains_grad


def has_global_hooks() -> bool:
    """Whether someone has hooks on the forward or backward of every module there is."""
    kinds = "forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks"
    return any(getattr(_module, f"_global_{kind}") for kind in kinds)
