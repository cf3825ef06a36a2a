"""The accounting of one training step: storages, peaks and collectives, counted op by op.

Owns: the dispatch mode that sees every op of a step and what it says was alive, when, and what
went over the wire. Must not know: models, plans, layers or meshes. It counts what it is shown,
so it is as good for a plain model or another library's parallelism as for this one.

How an op is seen
    A ``TorchDispatchMode`` runs below autograd, so the ops of autograd Functions, of the backward
    and of recomputation are seen like any other. An op on a wrapper tensor (``DTensor``,
    ``AsyncCollectiveTensor``, any traceable wrapper subclass) is handed back to the wrapper, which
    then issues the ops it stands for on its local tensors, and those are counted. The wrapper's own
    storage has a size but no memory behind it and is never counted.

What is counted
    A storage is *made* by the step if an op returned it and no op was given it before. Storages
    that an op is given first (parameters, buffers, inputs, a `.grad` from an earlier step) were
    there before, and are not counted. Views and in-place results share their base's storage and
    count once. A storage is *alive* until the last thing that holds it lets go, whoever that is:
    the autograd graph, a Python variable, a cache on a module. It is the whole storage that is
    counted, so a small view that keeps a large buffer alive costs the large buffer.

What is not
    Ops on fake tensors that run beside the step only to learn a shape, as DTensor does for every op
    it meets for the first time. Memory a kernel takes and returns within one op (workspaces,
    cuBLAS, NCCL), the allocator's rounding and fragmentation, and the parameters themselves. Meta
    tensors have no memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

Phase = Literal["forward", "backward"]

# Every collective op by its name, whichever namespace it lives in; the first match wins. A trailing
# underscore (the in-place and c10d forms), `_coalesced` and `_out` are the same collective.
_COLLECTIVE_PREFIXES: tuple[tuple[str, str], ...] = (
    ("all_gather", "all_gather"),
    ("allgather", "all_gather"),
    ("_allgather", "all_gather"),
    ("reduce_scatter", "reduce_scatter"),
    ("_reduce_scatter", "reduce_scatter"),
    ("all_reduce", "all_reduce"),
    ("allreduce", "all_reduce"),
    ("all_to_all", "all_to_all"),
    ("alltoall", "all_to_all"),
    ("broadcast", "broadcast"),
    ("scatter", "scatter"),
    ("gather", "gather"),
    ("reduce", "reduce"),
    ("send", "send"),
    ("recv", "recv"),
)
_COLLECTIVE_NAMESPACES = frozenset({"c10d", "_c10d_functional", "_c10d_functional_autograd"})


@dataclass(frozen=True, slots=True)
class CollectiveCount:
    """How often one kind of collective ran, and its payload.

    Attributes:
        calls: number of collectives this rank took part in.
        bytes: payload, the size of the *full* buffer summed over the calls: the gathered output of
            an all-gather, the unreduced input of a reduce-scatter, the tensor itself otherwise. A
            ring moves (tp - 1) / tp of it per rank, and twice that for an all-reduce.
    """

    calls: int = 0
    bytes: int = 0

    def __add__(self, other: CollectiveCount) -> CollectiveCount:
        return CollectiveCount(self.calls + other.calls, self.bytes + other.bytes)

    def __sub__(self, other: CollectiveCount) -> CollectiveCount:
        return CollectiveCount(self.calls - other.calls, self.bytes - other.bytes)


@dataclass(frozen=True, slots=True)
class LiveStorage:
    """A storage the step made that is still alive: what made it, and what it costs.

    Attributes:
        op: the op that made it, such as ``aten.mm.default``.
        shape: shape of the tensor the op returned; a later view may show another.
        dtype: dtype of that tensor.
        phase: whether the forward or the backward made it.
        nbytes: size of the whole storage.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    phase: Phase
    nbytes: int


class _StorageRef(weakref.ref):
    """A weak reference that knows its storage's address after the storage is gone."""

    __slots__ = ("address",)

    address: int

    def __new__(
        cls, storage: torch.UntypedStorage, callback: Callable[[_StorageRef], None]
    ) -> _StorageRef:
        self = super().__new__(cls, storage, callback)
        self.address = storage._cdata
        return self


class StepAccounting(TorchDispatchMode):
    """Counts the storages and the collectives of the ops that run inside it.

    Works alike on real tensors and under ``FakeTensorMode``, on real process groups and on the fake
    one. Enter it last, inside the fake mode. One instance counts one step; storages go on being
    tracked after the exit, so that what outlives a step can be read too.

    Attributes:
        phase: what the ops that run now are booked under; set it between forward and backward.
        live_bytes: bytes of the storages made so far that are alive now.
        peak_bytes: largest `live_bytes` right after any op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase: Phase = "forward"
        self.live_bytes = 0
        self.peak_bytes = 0
        self._collectives: dict[Phase, dict[str, CollectiveCount]] = {"forward": {}, "backward": {}}
        # By address of the C++ storage, which is unique while it lives. None: it was there before.
        self._refs: dict[int, _StorageRef] = {}
        self._made: dict[int, LiveStorage | None] = {}
        self._depth: tuple[int, int] | None = None

    def __enter__(self) -> StepAccounting:
        self._depth = _fake_depth()
        super().__enter__()
        return self

    def collectives(self, phase: Phase) -> dict[str, CollectiveCount]:
        """Return the collectives of one phase by kind, in order of first use."""
        return dict(self._collectives[phase])

    def alive(self) -> list[LiveStorage]:
        """Return the storages made so far that are alive now, largest first."""
        made = [record for record in self._made.values() if record is not None]
        return sorted(made, key=lambda record: record.nbytes, reverse=True)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Count one op; hand ops on wrapper tensors back to the wrapper."""
        if any(is_traceable_wrapper_subclass_type(t) for t in types):
            return NotImplemented
        kwargs = kwargs or {}
        if _fake_depth() != self._depth:
            return func(*args, **kwargs)
        op = str(func)
        # `torch.tensor` fills its storage out of sight and shows it here for the first time.
        if not op.startswith("aten.lift"):
            for tensor in _plain_tensors((args, kwargs)):
                self._note(tensor, None)

        out = func(*args, **kwargs)
        if op == "_c10d_functional.wait_tensor.default":
            # The kernel returns its input; the fake one makes a second buffer that no rank has.
            return args[0]
        for tensor in _plain_tensors(out):
            self._note(tensor, op)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        kind = _collective_kind(func)
        if kind is not None:
            counts = self._collectives[self.phase]
            payload = max(_operand_bytes(x) for x in (*args, *kwargs.values(), out))
            counts[kind] = counts.get(kind, CollectiveCount()) + CollectiveCount(1, payload)
        return out

    def _note(self, tensor: Tensor, op: str | None) -> None:
        """Track a tensor's storage; `op` is what returned it, None if it was there before."""
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        if address not in self._refs:
            self._refs[address] = _StorageRef(storage, self._forget)
            self._made[address] = None
            if op is not None:
                shape = tuple(tensor.shape)
                record = LiveStorage(op, shape, tensor.dtype, self.phase, nbytes)
                self._made[address] = record
                self.live_bytes += nbytes
            return
        known = self._made[address]
        if known is not None and known.nbytes != nbytes:  # resize_ and its like
            self.live_bytes += nbytes - known.nbytes
            self._made[address] = LiveStorage(
                known.op, tuple(tensor.shape), known.dtype, known.phase, nbytes
            )

    def _forget(self, ref: _StorageRef) -> None:
        self._refs.pop(ref.address, None)
        record = self._made.pop(ref.address, None)
        if record is not None:
            self.live_bytes -= record.nbytes


def _fake_depth() -> tuple[int, int]:
    """Which fake mode is on, and how often it was entered.

    A fake mode that is entered during a step serves a question about shapes, not the step: DTensor
    runs every op it has not met before once more, on fake tensors of the global shape. It takes the
    mode that is on already if there is one, so that only the depth tells the two apart.
    """
    mode = active_fake_mode()
    # `enter_stack` is private, in torch 2.11 to 2.14 alike; without it such ops inflate the peak.
    return (0, 0) if mode is None else (id(mode), len(mode.enter_stack))


def _plain_tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree that have memory of their own, looking through wrappers."""
    for leaf in tree_leaves(tree):
        if not isinstance(leaf, Tensor):
            continue
        if is_traceable_wrapper_subclass_type(type(leaf)):
            names, _ = leaf.__tensor_flatten__()  # type: ignore[attr-defined]
            yield from _plain_tensors([getattr(leaf, name) for name in names])
        else:
            yield leaf


def _operand_bytes(operand: Any) -> int:
    """Bytes of one operand of a collective; a list of tensors is one operand."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _plain_tensors(operand))


def _collective_kind(func: Any) -> str | None:
    namespace, _, rest = str(func).partition(".")
    if namespace not in _COLLECTIVE_NAMESPACES:
        return None
    name = rest.partition(".")[0]
    return next((kind for prefix, kind in _COLLECTIVE_PREFIXES if name.startswith(prefix)), None)
