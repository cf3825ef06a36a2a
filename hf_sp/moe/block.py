"""Mixture-of-experts blocks: what hangs on the block, its router, its experts, its shared expert.

Routing and the rest of the block stay HF's own code. Everything in it is linear in the gradient
that comes in, and each rank computes on its own part: of the experts' features (the block is a TP
block), or of the tokens (whole experts, ``ep``). So every weight that is stored whole gets a
partial gradient, which is summed, and the input gradients of router, experts and shared expert
share the block's one reduction.

Shape letters: B batch, S sequence, s = S / tp, T tokens of the block, k experts a token, E experts,
H hidden.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.model.block import BlockBoundary, put_hidden, take_hidden
from hf_sp.model.columns import entered_linear
from hf_sp.model.entered import Member, entered
from hf_sp.model.linear import ColumnParallelLinear
from hf_sp.model.local import cast_for_autocast, local, local_of_groups
from hf_sp.model.parameters import LocalParameters
from hf_sp.moe.dispatcher import send, travelling_experts
from hf_sp.moe.experts import Place, Weights, local_experts
from hf_sp.moe.flat import FlatEntry, enter_sparse
from hf_sp.plan.schema import Block, Experts
from hf_sp.state import ParallelState


class SparseBoundary(BlockBoundary):
    """Entry and exit of a sparse block, and the marks on what it flattens inside.

    Experts split by features: all-gather and reduce-scatter, as any TP block. Whole experts: the
    block stays on the sequence shard and has no collective of its own.
    """

    def __init__(self, state: ParallelState, model: nn.Module, block: Block) -> None:
        super().__init__(state, [], attention=False)
        assert block.experts is not None
        self.form = block.experts
        self.own = block.experts.split == "experts"
        self.router = model.get_submodule(block.experts.router)
        self.experts = model.get_submodule(block.experts.path)
        columns = [
            module
            for leaf in block.leaves
            if isinstance(module := model.get_submodule(leaf.path), ColumnParallelLinear)
            # Where tokens travel, the shared expert is a TP block of its own.
            and not (self.own and leaf.path.startswith(block.experts.shared + "."))
        ]
        self.members: list[tuple[object, Member]] = [
            (self.router, RouterMember(self.router, state)),
            (self.experts, ExpertsMember(self.experts, state)),
            *((linear, linear) for linear in columns),
        ]
        self.marked = [self.experts, *columns]

    def install(self, module: nn.Module) -> None:
        """Register the hooks of the block and of what is in it."""
        super().install(module)
        for inner in self.marked:
            inner.register_forward_pre_hook(self.mark, prepend=True)
        RouterParameters(self).install(self.router)
        forward = ExpertsForward(self)
        setattr(self.experts, "forward", forward)  # noqa: B010 (a method to mypy)

    def current(self) -> FlatEntry | None:
        """The entry of the forward that is running."""
        return cast(FlatEntry, self.entries[-1]) if self.entries else None

    def mark(self, module: nn.Module, args: tuple) -> None:
        """Let a module inside know the gathered tensor, which HF has flattened."""
        entry = self.current()
        if entry is not None and args:
            entry.mark(args[0])

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """All-gather the input, or stay on the shard."""
        jitters = module.training and float(getattr(module, "jitter_noise", 0) or 0) > 0
        state = self.state
        entry = FlatEntry(
            state.axis, state.sharded, None, batch_major=True, own=self.own, copy=jitters
        )
        # With noise on the tokens the entry could not gather them again: they are saved.
        full = enter_sparse(entry, take_hidden(args, kwargs), [] if jitters else self.members)
        self.entries.append(entry)
        if jitters and self.own:
            # Each rank has other tokens, and draws other noise.
            self.dropout.start(full)
        return put_hidden(args, kwargs, full)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Reduce the block's partial output, unless its tokens are this rank's own."""
        if not self.own:
            return super().leave(module, args, output)
        self.dropout.stop()
        if self.entries:
            self.entries.pop().close()
        return None


class RouterMember:
    """The router's replicated weight; its gradient is partial, in tokens or in features."""

    def __init__(self, module: nn.Module, state: ParallelState) -> None:
        self.module, self.state = module, state

    def local_parameters(self, like: Tensor) -> tuple[Tensor, None]:
        """The weight; its gradient is summed over the ranks."""
        weight = local(cast(Tensor, self.module._parameters["weight"]))
        return cast_for_autocast(pairs.identity_allreduce(weight, self.state.axis), like), None


class ExpertsMember:
    """The experts' packed gate and up projections."""

    def __init__(self, module: nn.Module, state: ParallelState) -> None:
        self.module, self.state = module, state

    def local_parameters(self, like: Tensor) -> tuple[Tensor, None]:
        """This rank's features or experts."""
        return expert_weight(cast(Tensor, self.module.gate_up_proj), self.state, like), None


def expert_weight(p: Tensor, state: ParallelState, like: Tensor) -> Tensor:
    """This rank's part of an expert weight, cast for autocast.

    Experts that are split over data parallel ranks see the tokens of all: the sum of what FSDP
    would have averaged over the groups.
    """
    mine = local_of_groups(p, state.data) if state.spread else local(p)
    return cast_for_autocast(mine, like)


class RouterWeight:
    """What HF's router reads as ``self.weight``: ``F.linear`` with it does not save the tokens.

    No tensor, but to torch's functions like one; its attributes and methods are the weight's.
    """

    def __init__(self, weight: Tensor, boundary: SparseBoundary) -> None:
        self._weight, self._boundary = weight, boundary

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weight, name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A linear on the gathered tokens goes through the block's entry; all else is plain."""
        if func is F.linear and len(args) == 2 and not kwargs and isinstance(args[1], cls):
            boundary = args[1]._boundary
            entry = boundary.current()
            if entry is not None:
                entry.mark(args[0])
            found = entered(args[0], boundary.router)
            if found is not None:
                return entered_linear(args[0], *found)
        plain = tree_map_only(cls, lambda weight: weight._weight, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class RouterParameters(LocalParameters):
    """Shows the router its weight as a ``RouterWeight``."""

    def __init__(self, boundary: SparseBoundary) -> None:
        super().__init__(boundary.state, "always")
        self.boundary = boundary

    def show(self, module: nn.Module, args: Any) -> None:
        """Shadow the weight."""
        super().show(module, args)
        module.__dict__["weight"] = RouterWeight(module.__dict__["weight"], self.boundary)


class ExpertsForward:
    """The experts of one block, in place of HF's loop or grouped forward.

    Shapes:   tokens [T, H], top_k_index and top_k_weights [T, k] -> [T, H]
    """

    def __init__(self, boundary: SparseBoundary) -> None:
        self.boundary = boundary

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """This rank's part, or the whole output for this rank's tokens."""
        boundary, module = self.boundary, self.boundary.experts
        state, form = boundary.state, boundary.form
        x = cast_for_autocast(hidden_states, hidden_states)
        found = entered(hidden_states, module)
        if found is None:
            place, gate_up = Place(), ExpertsMember(module, state).local_parameters(x)[0]
        else:
            entry, slot = found
            assert isinstance(entry, FlatEntry)
            place, gate_up = Place(entry, slot), entry.parameters[slot][0]
        down = expert_weight(cast(Tensor, module.down_proj), state, x)
        weights = Weights(gate_up, down, state.kernels)
        index = top_k_index
        if state.sharded and boundary.own:
            index = _real_tokens_only(x, index, boundary.current(), state, form)
        _note_load(index, boundary.current(), state, form)
        if not boundary.own:
            return local_experts(x, index, top_k_weights, weights, place)
        if state.sharded:
            return self._travel(x, index, top_k_weights, weights, place)
        if state.spread:
            # One token of a generation, another on each data parallel rank: one tp rank sends it.
            index = index if state.rank == 0 else torch.full_like(index, form.count)
            out = self._travel(x, index, top_k_weights, weights, place)
            return pairs.allreduce_identity(out, state.axis)
        # One token of a generation, which every rank has: each adds what its experts make of it.
        first = state.rank * gate_up.shape[0]
        out = local_experts(x, index, top_k_weights, weights, place, first)
        return pairs.allreduce_identity(out, state.axis)

    def _travel(
        self, x: Tensor, index: Tensor, scale: Tensor, weights: Weights, place: Place
    ) -> Tensor:
        """Send the tokens, run what waits for that, and have the experts' output back."""
        axis, around = self.boundary.state.expert_axis, self.boundary.current()
        sent = send(x, index, scale, weights.down.shape[0], axis)
        try:
            if around is not None:
                around.run_beside()
        except BaseException:
            sent.land()  # whatever was launched is waited for
            raise
        return travelling_experts(x, sent, scale, weights, place, axis)


def _length_here(state: ParallelState, s: int) -> int | None:
    """How many of the ``s`` places of this rank's shard are real, if that is known."""
    length = state.attended if state.length is None else state.length
    if length is None or comm.padded(length, state.tp) != s * state.tp:
        return None
    return min(max(length - state.rank * s, 0), s)


def _real_tokens_only(
    x_TH: Tensor, index_Tk: Tensor, entry: FlatEntry | None, state: ParallelState, form: Experts
) -> Tensor:
    """Send no padding: E for the experts of tokens past the end of the sequence.

    They are zeros, and what an expert makes of them is zero. That is asked of the tokens, too: in a
    recomputation of the block alone the length may be another forward's.
    """
    if entry is None:
        return index_Tk
    batch, s, hidden = entry.shape
    here = _length_here(state, s)
    if here is None or here == s:
        return index_Tk
    zero = ~(x_TH.detach().view(batch, s, hidden)[:, here:] != 0).any(-1, keepdim=True)
    index = index_Tk.view(batch, s, -1).clone()
    index[:, here:].masked_fill_(zero, form.count)
    return index.view(batch * s, -1)


def _note_load(
    index_Tk: Tensor, entry: FlatEntry | None, state: ParallelState, form: Experts
) -> None:
    """Count the tokens of each expert, for whoever reads ``expert_load``."""
    if state.length is None or entry is None:
        return  # a recomputation in backward: counted before
    if entry.own and not state.sharded and state.rank > 0:
        index_Tk = torch.full_like(index_Tk, form.count)  # each rank has them: the first counts
    if state.sharded and not entry.own:
        batch, length, _ = entry.shape
        index_Tk = index_Tk.view(batch, length, -1)[:, : state.length]
    flat = index_Tk.detach().reshape(-1)
    counts = flat.new_zeros(form.count + 1)
    state.load[form.path] = counts.scatter_add_(0, flat, torch.ones_like(flat))[: form.count]


def leave_router_logits(
    logits: tuple[Tensor, ...], state: ParallelState, batch: int
) -> tuple[Tensor, ...]:
    """Router logits as HF has them, ``[B * S, E]``, with gradients that count once.

    What is computed from them (the auxiliary loss) is computed alike on all ranks, while the
    router's gradient is a sum over ranks. Where each rank has routed its own tokens, it takes its
    own part; where all have routed all tokens, one rank's gradient counts.
    """
    length = state.length
    assert length is not None

    def leave(local_TE: Tensor) -> Tensor:
        if not state.sharded:
            # Tokens travel in no such forward: every rank has routed every token.
            return pairs.identity_onerank(local_TE, state.axis)
        by_row = local_TE.view(batch, -1, local_TE.shape[-1])
        if state.plan.ep > 1:
            full = pairs.allgather_scatter(by_row, length, state.axis)
        else:
            full = pairs.identity_onerank(by_row[:, :length], state.axis)
        return full.reshape(batch * length, -1)

    return tuple(leave(x) for x in logits)
