"""One deliberate fault for every collective, reduction and correction of hf_sp.

A fault replaces one function for the life of the parallel model. It keeps shapes and the order of
collectives, so that nothing fails but the numbers: these are the faults that train silently wrong.
``FAULTS`` maps a name to the patches and to the parity case that must notice.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from harness.parity import Case

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.kernels import cross_entropy_steps as steps
from hf_sp.model import block as boundary
from hf_sp.model import columns as entry
from hf_sp.model import embedding, head, lazy, loss, parameters
from hf_sp.model import mlp as gated
from hf_sp.model import norm as fused
from hf_sp.model import shard as swap

Patch = tuple[Any, str, Any]
Factory = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Fault:
    """What is replaced, and where it must show."""

    patches: Callable[[], list[Patch]]
    case: Case
    tp: int = 2


FAULTS: dict[str, Fault] = {}


def fault(case: Case | None = None, tp: int = 2) -> Callable:
    """Register the decorated function, which returns the patches, under its name."""

    def register(patches: Callable[[], list[Patch]]) -> Factory:
        return _register(patches.__name__, patches, case or Case("llama_bias"), tp)

    return register


def _register(name: str, patches: Callable[[], list[Patch]], case: Case, tp: int) -> Factory:
    FAULTS[name] = Fault(patches, case, tp)

    @contextlib.contextmanager
    def active() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for owner, attribute, value in patches():
                stack.enter_context(mock.patch.object(owner, attribute, value))
            yield

    # What ``around="mutants.faults:<name>"`` finds.
    globals()[name] = active
    return active


# --- the building blocks of wrong collectives ---------------------------------------------------


def _own_part(x: torch.Tensor, axis: comm.Axis) -> torch.Tensor:
    """A reduce-scatter that forgets to reduce."""
    return x.chunk(axis.size)[axis.rank].clone()


def _own_copies(x: torch.Tensor, axis: comm.Axis) -> torch.Tensor:
    """An all-gather that shows every rank only its own part."""
    return torch.cat([x] * axis.size)


def _rolled(x: torch.Tensor, axis: comm.Axis) -> torch.Tensor:
    """An all-gather in the wrong rank order."""
    return comm.wait(comm.launch_all_gather(x, axis)).roll(x.shape[0], 0)


def _averaged(function: Callable) -> Callable:
    return lambda x, axis, *rest: function(x, axis, *rest) / axis.size


def _backward(cls: type, grads: Callable[..., Any]) -> Patch:
    return (cls, "backward", staticmethod(grads))


# --- entry and exit of the stack ----------------------------------------------------------------


@fault()
def stack_entry_backward_keeps_own_shard() -> list[Patch]:
    def backward(ctx, grad):
        x = _own_copies(grad.transpose(0, 1).contiguous(), ctx.axis)
        return x[: ctx.length].transpose(0, 1), None

    return [_backward(comm._ScatterAllGather, backward)]


@fault()
def stack_entry_takes_the_wrong_shard() -> list[Patch]:
    right = comm.own_shard

    def wrong(x, axis):
        return right(x, comm.Axis(axis.group, axis.size, (axis.rank + 1) % axis.size))

    return [(comm, "own_shard", wrong)]


# With kept logits the final hidden states are gathered whole, and the loss computes on them.
@fault(Case("llama", parallelize=(("keep_logits", True),)))
def final_gather_in_wrong_rank_order() -> list[Patch]:
    def forward(ctx, x, length, axis):
        ctx.axis = axis
        return _rolled(x.transpose(0, 1), axis)[:length].transpose(0, 1)

    return [(comm._AllGatherScatter, "forward", staticmethod(forward))]


# --- entry of a TP block ------------------------------------------------------------------------


@fault()
def block_entry_gathers_own_copies() -> list[Patch]:
    def wrong(x, length, axis):
        return _own_copies(x.transpose(0, 1).contiguous(), axis)[:length].transpose(0, 1)

    return [(comm, "gather_sequence", wrong)]


@fault()
def block_entry_regathers_in_wrong_rank_order() -> list[Patch]:
    right = entry._weight_gradients

    def wrong(*args):
        with mock.patch.object(comm, "all_gather", _rolled):
            return right(*args)

    return [(entry, "_weight_gradients", wrong)]


@fault()
def block_entry_backward_does_not_reduce() -> list[Patch]:
    keep = comm.launch_reduce_scatter
    # The forward's own reduce-scatter stays right: only dx is wrong.
    return [
        (comm, "launch_reduce_scatter", _own_part),
        (comm, "reduce_scatter", lambda x, axis: comm.wait(keep(x, axis))),
    ]


@fault()
def block_entry_backward_averages() -> list[Patch]:
    right = comm.launch_reduce_scatter
    # The forward's own reduce-scatter is averaged too; undone there, so that only dx is wrong.
    return [
        (comm, "launch_reduce_scatter", _averaged(right)),
        (comm, "reduce_scatter", lambda x, axis: comm.wait(right(x, axis))),
    ]


@fault()
def block_keeps_only_the_last_input_gradient() -> list[Patch]:
    right = entry.Entry.receive

    def wrong(self, slot, dy, weight, keep):
        self.dx = None
        right(self, slot, dy, weight, keep)

    return [(entry.Entry, "receive", wrong)]


@fault(Case("llama_bias", sp=False))
def tp_entry_backward_does_not_reduce() -> list[Patch]:
    keep = comm.launch_all_reduce
    return [
        (comm, "launch_all_reduce", lambda x, axis: x.clone()),
        (comm, "all_reduce", lambda x, axis: comm.wait(keep(x, axis))),
    ]


# --- exit of a TP block -------------------------------------------------------------------------


@fault()
def block_exit_does_not_reduce() -> list[Patch]:
    def forward(ctx, x, axis):
        ctx.axis, ctx.length = axis, x.shape[1]
        padded = comm.pad_sequence(x.transpose(0, 1), axis)
        return _own_part(padded, axis).transpose(0, 1)

    return [(comm._ReduceScatterAllGather, "forward", staticmethod(forward))]


@fault()
def block_exit_averages() -> list[Patch]:
    return [(comm, "reducescatter_allgather", _averaged(pairs.reducescatter_allgather))]


@fault()
def block_exit_backward_keeps_own_shard() -> list[Patch]:
    def backward(ctx, grad):
        x = _own_copies(grad.transpose(0, 1).contiguous(), ctx.axis)
        return x[: ctx.length].transpose(0, 1), None

    return [_backward(comm._ReduceScatterAllGather, backward)]


@fault(Case("llama", sp=False))
def tp_exit_backward_reduces_again() -> list[Patch]:
    def backward(ctx, grad):
        return comm.all_reduce(grad, ctx.axis), None

    def forward(ctx, x, axis):
        ctx.axis = axis
        return comm.all_reduce(x, axis)

    cls = comm._AllReduceIdentity
    return [_backward(cls, backward), (cls, "forward", staticmethod(forward))]


# --- gradients that are partial -----------------------------------------------------------------


def _partial_not_summed() -> list[Patch]:
    return [
        _backward(comm._IdentityAllReduce, lambda ctx, grad: (grad, None)),
        (fused, "sum_over_ranks", lambda dw, axis: dw),
    ]


def _partial_averaged() -> list[Patch]:
    def backward(ctx, grad):
        return comm.all_reduce(grad, ctx.axis) / ctx.axis.size, None

    return [
        _backward(comm._IdentityAllReduce, backward),
        (fused, "sum_over_ranks", _averaged(comm.all_reduce)),
    ]


for _family, _sp, _tp, _kernels in [
    ("llama", True, 2, True),  # norms on sequence shards
    ("llama", True, 2, False),
    ("qwen3", False, 2, True),  # q_norm, k_norm on local heads, in plain TP too
    ("qwen3", False, 2, False),
    ("llama_kv1", False, 2, True),  # k and v of a head that several ranks compute
    ("llama_kv2", True, 4, True),
]:
    _where = f"{_family}_{'sp' if _sp else 'tp'}" + ("" if _kernels else "_own_norms")
    _case = Case(_family, sp=_sp, parallelize=(("kernels", _kernels),))
    _register(f"partial_gradient_not_summed_{_where}", _partial_not_summed, _case, _tp)
    _register(f"partial_gradient_averaged_{_where}", _partial_averaged, _case, _tp)


@fault(Case("llama", accum=3))
def norm_gradients_summed_on_the_accumulated_grad() -> list[Patch]:
    """transformers 5.23's fault: a hook on ``param.grad`` reduces the running sum every time."""
    calls: list[int] = []

    def again(dw, axis):
        # The first micro-batch's sums (two layers' norms and the final one) are reduced again.
        calls.append(1)
        reduced = comm.all_reduce(dw, axis)
        return reduced * axis.size if len(calls) <= 5 else reduced

    return [(fused, "sum_over_ranks", again)]


@fault(Case("llama_bias", parallelize=(("kernels", False),)))
def norm_gradients_left_partial() -> list[Patch]:
    def show(self, module, args):
        for name, p in module._parameters.items():
            if p is not None:
                module.__dict__[name] = parameters.local(p)

    return [(parameters.LocalParameters, "show", show)]


# --- what is made again in backward -------------------------------------------------------------


@fault()
def norm_made_again_without_its_weight() -> list[Patch]:
    right = fused._norm_again

    def wrong(x, weight, **kwargs):
        return right(x, torch.ones_like(weight), **kwargs)

    return [(fused, "_norm_again", wrong)]


@fault()
def norm_made_again_from_the_wrong_shard() -> list[Patch]:
    right = fused._norm_again
    return [
        (fused, "_norm_again", lambda x, weight, **kwargs: right(x.roll(1, 1), weight, **kwargs))
    ]


@fault()
def product_made_again_from_gate_alone() -> list[Patch]:
    right = gated.swiglu_backward

    def wrong(dz, gate, up, **kwargs):
        dgate, dup, product = right(dz, gate, up, **kwargs)
        return dgate, dup, product / up

    return [(gated, "swiglu_backward", wrong)]


@fault()
def gated_gradient_without_its_slope() -> list[Patch]:
    """d silu(g) taken for sigmoid(g): the second term of the derivative is missing."""
    right = gated.swiglu_backward

    def wrong(dz, gate, up, **kwargs):
        _, dup, product = right(dz, gate, up, **kwargs)
        return dz * up * gate.sigmoid(), dup, product

    return [(gated, "swiglu_backward", wrong)]


@fault()
def gated_row_bias_added_on_every_rank() -> list[Patch]:
    right = gated.GatedRowLinear.forward

    def forward(ctx, gate, up, product, weight, bias, add_bias, *rest):
        return right(ctx, gate, up, product, weight, bias, True, *rest)

    return [(gated.GatedRowLinear, "forward", staticmethod(forward))]


# --- row bias, padding row, replicated heads ----------------------------------------------------


@fault()
def row_bias_added_on_every_rank() -> list[Patch]:
    right = gated.RowLinear.forward

    def forward(ctx, x, weight, bias, add_bias, sharded):
        return right(ctx, x, weight, bias, True, sharded)

    return [(gated.RowLinear, "forward", staticmethod(forward))]


@fault()
def row_bias_gradient_summed_again() -> list[Patch]:
    right = gated.RowLinear.backward

    def backward(ctx, grad):
        dx, dw, db, *rest = right(ctx, grad)
        return dx, dw, db * 2, *rest

    return [_backward(gated.RowLinear, backward)]


@fault(Case("llama_odd_vocab"))
def padding_row_gets_a_gradient() -> list[Patch]:
    right = embedding.F.embedding
    return [(embedding.F, "embedding", lambda ids, weight, padding: right(ids, weight))]


@fault(Case("llama_kv2"), tp=4)
def replicated_head_is_the_wrong_one() -> list[Patch]:
    right = swap._swap_linear

    def wrong(module, leaf, *rest):
        right(module, leaf, *rest)
        if module.rows is not None:
            first, width = module.rows
            module.rows = (width - first, width)

    return [(swap, "_swap_linear", wrong)]


@fault(Case("llama"))
def mask_of_another_length() -> list[Patch]:
    """The block's input keeps one row too few: positions shift against the mask."""
    right = comm.gather_sequence
    return [(comm, "gather_sequence", lambda x, n, axis: right(x, n, axis).roll(1, 1))]


# --- embedding, head and loss -------------------------------------------------------------------


@fault()
def embedding_is_not_summed() -> list[Patch]:
    right = pairs.allreduce_identity
    return [(embedding.comm, "allreduce_identity", lambda x, axis: right(x, axis) * 0 + x)]


@fault(Case("llama_odd_vocab"))
def embedding_looks_up_ids_of_other_ranks() -> list[Patch]:
    return [(embedding, "vocab_range", lambda vocab, axis: (0, -(-vocab // axis.size)))]


@fault()
def loss_uses_local_statistics() -> list[Patch]:
    return [(loss, "share", lambda stats, axis: torch.stack([stats] * axis.size))]


@fault()
def loss_combines_sums_without_their_peaks() -> list[Patch]:
    right = loss.combine

    def wrong(stats, labels, terms):
        highest = stats[:, 0].amax(0).expand_as(stats[:, 0])
        return right(torch.cat([highest[:, None], stats[:, 1:]], 1), labels, terms)

    return [(loss, "combine", wrong)]


def _with_terms(**wrong: Any) -> list[Patch]:
    """The gradient of another loss than the one whose value is returned."""
    right = loss.write_gradient

    def write(logits, labels, whole, terms):
        return right(logits, labels, whole, dataclasses.replace(terms, **wrong))

    return [(loss, "write_gradient", write)]


@fault()
def loss_gradient_smooths_the_labels() -> list[Patch]:
    return _with_terms(label_smoothing=0.1)


@fault(Case("granite"))
def loss_gradient_is_not_scaled() -> list[Patch]:
    return _with_terms(scale=1.0)


@fault(Case("granite"))
def scale_of_the_logits_is_dropped() -> list[Patch]:
    return [(lazy.LazyLogits, "scale_and_softcap", lambda self: (1.0, None))]


@fault(Case("llama_capped"))
def derivative_of_the_softcap_is_dropped() -> list[Patch]:
    right = steps._slab_gradient

    def wrong(x, labels, peak, total, dloss, terms):
        capped = steps._mapped(x, terms)
        plain = dataclasses.replace(terms, softcap=None, scale=1.0)
        return right(capped, labels, peak, total, dloss, plain) * terms.scale

    return [(steps, "_slab_gradient", wrong)]


@fault(Case("llama_capped"))
def soft_cap_is_dropped() -> list[Patch]:
    return [(lazy.LazyLogits, "scale_and_softcap", lambda self: (1.0, None))]


@fault()
def loss_counts_the_target_on_every_rank() -> list[Patch]:
    right = loss.write_gradient
    return [(loss, "write_gradient", lambda *args: right(*args).clamp_min_(0))]


@fault()
def loss_gradient_is_not_reduced() -> list[Patch]:
    return [(loss, "_launch", lambda dx, spec: _own_part(dx, spec.axis))]


@fault(Case("llama", sp=False))
def loss_gradient_is_averaged() -> list[Patch]:
    right = loss._launch
    return [(loss, "_launch", lambda dx, spec: right(dx / spec.axis.size, spec))]


@fault(Case("llama", parallelize=(("loss_chunk", 8),)))
def loss_gradient_goes_to_another_chunk() -> list[Patch]:
    right = loss._store

    def store(dsource, dx, rows, spec):
        a, b = rows
        room = dsource.shape[1] - (b - a)
        right(dsource, dx, (room - a, room - a + b - a) if room >= a else rows, spec)

    return [(loss, "_store", store)]


@fault()
def loss_gathers_a_chunk_in_wrong_rank_order() -> list[Patch]:
    right = loss._chunks

    def wrong(source, full, labels, pieces, spec):
        for x, y, rows in right(source, full, labels, pieces, spec):
            yield x.roll(x.shape[0] // spec.axis.size, 0), y, rows

    return [(loss, "_chunks", wrong)]


@fault(Case("llama", parallelize=(("loss_chunk", 8),)))
def loss_keeps_only_the_last_chunks_weight_gradient() -> list[Patch]:
    return [(loss, "_plus", lambda total, part, wide, parts: part.to(wide))]


@fault()
def labels_are_not_shifted() -> list[Patch]:
    right = head.F.pad
    return [(head.F, "pad", lambda x, pad, value: right(x, (1, 0), value=value))]


@fault()
def labels_of_the_wrong_shard_order() -> list[Patch]:
    right = loss._chunks

    def wrong(source, full, labels, pieces, spec):
        for x, y, rows in right(source, full, labels, pieces, spec):
            yield x, y.roll(y.shape[0] // spec.axis.size), rows

    return [(loss, "_chunks", wrong)]


@fault()
def hidden_states_scattered_without_gather_in_backward() -> list[Patch]:
    right = boundary.StackEntry.__call__

    def wrong(self, module, args, kwargs):
        args, kwargs = right(self, module, args, kwargs)
        x = boundary.take_hidden(args, kwargs)
        return boundary.put_hidden(args, kwargs, x.detach() + 0 * x)

    return [(boundary.StackEntry, "__call__", wrong)]


# They register their own; at the end, because they need what is above.
import mutants.data_faults  # noqa: E402
import mutants.sparse_faults  # noqa: E402, F401
