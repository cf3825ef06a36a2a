"""The private names of torch that hf_sp stands on.

One place to look when torch changes; each says why it is needed and is held, with the versions
torch 2.11 to 2.14 in mind, by tests/unit/test_torch_private.py. Must not know hf_sp.

Not here: the placement of packed tensors (``torch_packed``); attention (``torch_attention``);
``nn.Module._parameters`` and its kin, which every package that edits modules uses; ``adapters`` and
``integrations``, which have tables of their own; and the few names that stand where they are used
(``estimate``'s, hooks of modules), which that test lists by file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, cast

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


def is_view(x: Tensor) -> bool:
    """Whether x keeps another tensor alive, of which it is a part."""
    return x._is_view()


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
