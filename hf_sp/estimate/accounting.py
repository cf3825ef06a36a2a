"""The accounting of one training step: storages, peaks and collectives, counted op by op.

Must not know models, plans, layers or meshes: it is as good for a plain model or another library's
parallelism as for this one.

How an op is seen
    A ``TorchDispatchMode`` runs below autograd, so that autograd Functions, the backward and
    recomputation are seen too. An op on a wrapper tensor (``DTensor``, ``AsyncCollectiveTensor``)
    is handed back to the wrapper, and the ops that this issues on its local tensors are counted.

What is counted
    Storages that an op returned and no op was given before: parameters, buffers, inputs and earlier
    `.grad` tensors are not. Views and in-place results share their base's storage, which counts
    once and whole. It is *alive* until the last thing that holds it lets go: the autograd graph, a
    Python variable, a cache on a module.

What is not
    Ops on fake tensors that run beside the step only to learn a shape, as DTensor's do. Memory that
    a kernel takes and returns within one op (workspaces, cuBLAS, NCCL); the allocator's rounding
    and fragmentation. Meta tensors, which have no memory.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

Phase = Literal["build", "forward", "backward", "optimizer"]

# What an op's name begins with, underscores aside; the first match wins. A trailing underscore (the
# in-place and c10d forms), `_coalesced` and `_out` are the same collective.
_KINDS = (
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "scatter",
    "gather",
    "reduce",
    "send",
    "recv",
)
_COLLECTIVE_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


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
class CollectiveRecord:
    """One collective: the op that ran, the kind it is, and its payload."""

    phase: Phase
    op: str
    kind: str
    bytes: int


@dataclass(frozen=True, slots=True)
class LiveStorage:
    """A storage the step made that is still alive."""

    op: str  # that made it, such as aten.mm.default
    shape: tuple[int, ...]  # of the tensor that the op returned; a later view may show another
    dtype: torch.dtype
    phase: Phase  # that made it
    nbytes: int  # of the whole storage


class StepAccounting(TorchDispatchMode):
    """Counts the storages and the collectives of the ops that run inside it.

    Works alike on real tensors and under ``FakeTensorMode``, on real process groups and on the fake
    one. Enter it last, inside the fake mode. One instance counts one step; storages go on being
    tracked after the exit, so that what outlives a step can be read too.

    Attributes:
        phase: what the ops that run now are booked under; set it between forward and backward.
        live_bytes: bytes of the storages made so far that are alive now.
        peak_bytes: largest `live_bytes` right after any op.
        host_bytes, host_peak: the same of what ops named `to_host` made, in neither of those.
        records: the collectives so far, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase: Phase = "forward"
        self.live_bytes = 0
        self.peak_bytes = 0
        self.host_bytes = 0
        self.host_peak = 0
        self.records: list[CollectiveRecord] = []
        # What came (True) and went, and how much of it had come about when the peak was reached.
        self._events: list[tuple[bool, LiveStorage]] = []
        self._peak_event = 0
        # By address of the C++ storage, which is unique while it lives: a reference that tells when
        # it is gone, and what made it. None: it was there before.
        self._storages: dict[int, tuple[weakref.ref, LiveStorage | None]] = {}
        self._depth: tuple[int, int] | None = None

    def __enter__(self) -> StepAccounting:
        self._depth = _fake_depth()
        before, resized = torch.UntypedStorage.resize_, self._resized

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = before(storage, size)
            resized(storage)
            return result

        # No op shows how FSDP frees a gathered weight, and makes room for it again.
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        self._before = before
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._before  # type: ignore[method-assign]

    def collectives(self, phase: Phase) -> dict[str, CollectiveCount]:
        """Return the collectives of one phase by kind, in order of first use."""
        counts: dict[str, CollectiveCount] = {}
        for one in self.records:
            if one.phase == phase:
                before = counts.get(one.kind, CollectiveCount())
                counts[one.kind] = before + CollectiveCount(1, one.bytes)
        return counts

    def alive(self) -> list[LiveStorage]:
        """Return the storages made so far that are alive now, largest first."""
        made = [record for _, record in self._storages.values() if record is not None]
        return sorted(made, key=lambda record: record.nbytes, reverse=True)

    def made(self, tensors: Iterable[Tensor]) -> list[LiveStorage]:
        """Return the records of those tensors' storages, but for storages that were there before.

        Of each storage once, and the same objects as `at_peak` returns.
        """
        storages = {t.untyped_storage()._cdata for t in _plain_tensors(list(tensors))}
        found = [self._storages[s][1] for s in storages if s in self._storages]
        return [record for record in found if record is not None]

    def book(self, tensors: Iterable[Tensor]) -> None:
        """Count storages that no op was seen to make, from now on."""
        for tensor in _plain_tensors(list(tensors)):
            _, made = self._storages.get(tensor.untyped_storage()._cdata, (None, None))
            if made is None:
                self._storages.pop(tensor.untyped_storage()._cdata, None)
                self._note(tensor, "booked")

    def restart_peak(self) -> None:
        """Look for the peak from now on."""
        self.peak_bytes, self._peak_event = self.live_bytes, len(self._events)

    def at_peak(self) -> list[LiveStorage]:
        """Return the storages made so far that were alive at the peak."""
        alive: dict[int, LiveStorage] = {}
        for came, record in self._events[: self._peak_event]:
            if came:
                alive[id(record)] = record
            else:
                del alive[id(record)]
        return list(alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one op."""
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
            if ".to_host." in op:
                self._note_host(tensor)
            self._note(tensor, op)
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self._peak_event = self.live_bytes, len(self._events)
        kind = _collective_kind(op)
        if kind is not None:
            # A list of tensors is one operand.
            operands = map(_plain_tensors, (*args, *kwargs.values(), out))
            payload = max(sum(t.numel() * t.element_size() for t in x) for x in operands)
            self.records.append(CollectiveRecord(self.phase, op, kind, payload))
        return out

    def _note(self, tensor: Tensor, op: str | None) -> None:
        """Track a tensor's storage; `op` is what returned it, None if it was there before."""
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()
        if address not in self._storages:
            ref = weakref.ref(storage, lambda _: self._forget(address))
            made = None
            if op is not None:
                made = LiveStorage(op, tuple(tensor.shape), tensor.dtype, self.phase, nbytes)
                self.live_bytes += nbytes
                self._events.append((True, made))
            self._storages[address] = ref, made
            return
        self._resized(tensor.untyped_storage(), tuple(tensor.shape))

    def _note_host(self, tensor: Tensor) -> None:
        """Track a storage of the host; to the device it is as one that was there before."""
        storage = tensor.untyped_storage()
        address, nbytes = storage._cdata, storage.nbytes()

        def forget(_: Any) -> None:
            self.host_bytes -= nbytes
            self._forget(address)

        self._storages[address] = weakref.ref(storage, forget), None
        self.host_bytes += nbytes
        self.host_peak = max(self.host_peak, self.host_bytes)

    def _resized(self, storage: torch.UntypedStorage, shape: tuple[int, ...] | None = None) -> None:
        """Book another size of a storage that is known."""
        ref, made = self._storages.get(storage._cdata, (None, None))
        if ref is None or made is None or made.nbytes == storage.nbytes():
            return
        self.live_bytes += storage.nbytes() - made.nbytes
        self._events.append((False, made))
        made = dataclasses.replace(made, shape=shape or made.shape, nbytes=storage.nbytes())
        self._events.append((True, made))
        self._storages[storage._cdata] = ref, made

    def _forget(self, address: int) -> None:
        _, made = self._storages.pop(address)
        if made is not None:
            self.live_bytes -= made.nbytes
            self._events.append((False, made))


def _fake_depth() -> tuple[int, int]:
    """Which fake mode is on, and how often it was entered.

    A step's own ops run at its depth. DTensor runs every new op once more to learn a shape, in the
    mode that is on already if there is one.
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


def _collective_kind(op: str) -> str | None:
    namespace, _, rest = op.partition(".")
    if namespace not in _COLLECTIVE_NAMESPACES:
        return None
    name = rest.replace("_", "")
    return next((kind for kind in _KINDS if name.startswith(kind.replace("_", ""))), None)
