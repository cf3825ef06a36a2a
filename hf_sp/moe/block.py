"""Mixture-of-experts blocks: what hangs on the block, its experts and its shared expert.

Routing and the rest of the block stay HF's own code, on flattened tokens.

Shape letters: B batch, S sequence, s = S / tp, T tokens of the block, k experts a token, E experts,
H hidden.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.model.block import BlockBoundary, factors_of, get_hidden_states, replace_hidden_states
from hf_sp.model.columns import Experts, gather_columns
from hf_sp.model.local import cast_for_autocast, local, local_of_groups
from hf_sp.model.low_rank import low_rank
from hf_sp.model.ports import BlockInput, GatheredInput, Port, column_linear
from hf_sp.model.recompute import Recompute, attach_recompute, recompute_of
from hf_sp.moe.dispatcher import Dispatcher
from hf_sp.moe.experts import Maths, gate_up_gradient, run_experts
from hf_sp.moe.router import RouterParameters
from hf_sp.plan.known_forms import experts_gating
from hf_sp.plan.schema import Block
from hf_sp.state import ParallelState
from hf_sp.torch_private import version


class SparseBoundary(BlockBoundary):
    """Entry and exit of a sparse block, and the forward of its experts.

    Experts split by features: a TP block like any other, whose entry also has the router's weight
    and the experts'. Whole experts: the block stays on this rank's tokens, which are sent to their
    experts; no collective of its own, and what reads the tokens saves what they are computed from.
    """

    def __init__(
        self, state: ParallelState, module: nn.Module, block: Block, columns: list[Any]
    ) -> None:
        assert block.experts is not None
        inside = block.path + "."
        # Where tokens travel, the shared expert is a TP block of its own.
        columns = [] if block.experts.split == "experts" else columns
        self.prepare(
            state, module.get_submodule(block.experts.path.removeprefix(inside)), block, columns
        )
        router: Any = module.get_submodule(self.form.router.removeprefix(inside))
        self.router, self.parameters = router, RouterParameters(state, router, self.route)
        self.chooser: Any = module.get_submodule(self.form.chooser.removeprefix(inside))
        self.linears.insert(0, (router, self.parameters))
        for column in columns:
            column.block = self.block

    def prepare(
        self, state: ParallelState, experts: nn.Module, block: Block, columns: list[Any]
    ) -> None:
        """Note the experts, and what they compute."""
        assert block.experts is not None
        BlockBoundary.__init__(self, state, BlockInput(), columns, attention=False)
        self.form, self.experts = block.experts, experts
        self.whole_experts = block.experts.split == "experts"
        self.gating = experts_gating(experts)

    def install(self, module: nn.Module) -> None:
        """Register the hooks of the block and of what is in it."""
        super().install(module)
        self.parameters.install(self.router)
        setattr(self.experts, "forward", self.run)  # noqa: B010 (a method to mypy)

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """All-gather the input, or stay on the shard."""
        state = self.state
        x = get_hidden_states(args, kwargs)
        jitters = module.training and float(getattr(module, "jitter_noise", 0) or 0) > 0
        if self.whole_experts:
            # With noise on the tokens they cannot be computed again: they are saved.
            recompute = None if jitters else recompute_of(x)
            x = x.contiguous()
            gathered = GatheredInput(x, version(x), True, 1, {}, x.shape, recompute=recompute)
        else:
            top_k = int(self.chooser.top_k)
            turned = self.form.transposed
            gradient = functools.partial(gate_up_gradient, top_k=top_k, transposed=turned)
            weight, width = self.weight("gate_up_proj", x), 2 * self.form.intermediate // state.tp
            experts = Experts(self.experts, weight, width, top_k, gradient)
            gathered = gather_columns(
                x,
                [] if jitters else self.linears,
                state.axis,
                sharded=state.sharded,
                length=None,
                batch_major=True,
                contiguous=True,
                factors=[] if jitters else factors_of(module, x),
                experts=None if jitters else experts,
            )
        if jitters:
            # The block writes into it.
            gathered.x = gathered.x.clone()
            if self.whole_experts:
                # Each rank has other tokens, and draws other noise.
                self.dropout.start(x)
        self.block.gathered = gathered
        return replace_hidden_states(args, kwargs, gathered.x)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Reduce the block's partial output, unless its tokens are this rank's own."""
        if not self.whole_experts:
            return super().leave(module, args, output)
        self.dropout.stop()
        self.block.close()
        return None

    def weight(self, name: str, like: Tensor) -> Tensor:
        """This rank's part of a weight of the experts, cast for autocast.

        Experts that are split over data parallel ranks see the tokens of all: the sum of what FSDP
        would have averaged over the groups.
        """
        p, state = getattr(self.experts, name), self.state
        mine = local_of_groups(p, state.data) if state.spread else local(p)
        return cast_for_autocast(mine, like)

    def port(self, reader: object, x: Tensor) -> Port | None:
        """The reader's port, if x is what the block was given; may be computed again, if so."""
        gathered = self.block.gathered or self.block.before(x)
        if gathered is None:
            return None
        if gathered.recompute is not None and gathered.reads(x):
            attach_reshaped(x, gathered.recompute)
        return gathered.port(reader, x)

    def route(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The router's product of its tokens."""
        port = self.port(self.router, x)
        if port is not None:
            return column_linear(x, port, batch_major=True)
        if not self.whole_experts or x.dtype != weight.dtype or not torch.is_grad_enabled():
            return None
        logits = low_rank(cast_for_autocast(x, x), cast_for_autocast(weight, x), None, 0)
        return logits if bias is None else logits + bias

    def run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts, in place of HF's loop or grouped forward.

        Shapes:   tokens [T, H], top_k_index and top_k_weights [T, k] -> [T, H]: this rank's part,
                  or the whole output for this rank's tokens
        """
        state, index = self.state, top_k_index
        port = self.port(self.experts, hidden_states)
        x = hidden_states if port is not None else cast_for_autocast(hidden_states, hidden_states)
        if port is not None and port.outputs[1].shape[0] != index.numel():
            port = None
        down = self.weight("down_proj", x)
        gate_up = self.weight("gate_up_proj", x) if port is None else port.weight
        count, mine = down.shape[0], index
        if self.whole_experts and not state.sharded and state.rank > 0:
            # One token of a generation, which every rank of tp has: the first counts and sends it.
            mine = torch.full_like(index, self.form.count)
        self._note_load(mine)
        if not self.whole_experts:
            dispatcher = Dispatcher.local(index, count)
        elif state.sharded or state.spread:
            dispatcher = Dispatcher.all_to_all(mine, count, state.expert_axis)
        else:
            # Each rank adds what its experts make of that token.
            dispatcher = Dispatcher.local(index, count, state.rank * count)
        biases: list[Tensor | None] = [None, None]
        if self.form.bias:
            biases = [self.weight(n, x) for n in ("gate_up_proj_bias", "down_proj_bias")]
        adds = self.whole_experts or state.rank == 0
        layout = self.form.transposed, self.form.interleaved
        maths = Maths(self.gating, state.kernels, *layout, adds_bias=adds)
        out = run_experts(x, top_k_weights, gate_up, down, biases, dispatcher, port, maths)
        whole = state.sharded or not self.whole_experts
        return out if whole else pairs.allreduce_identity(out, state.axis)

    def _note_load(self, index_Tk: Tensor) -> None:
        """Count the tokens of each expert, for whoever reads ``expert_load``."""
        state, count, gathered = self.state, self.form.count, self.block.gathered
        if state.length is None or gathered is None:
            return  # a recomputation in backward: counted before
        if state.sharded or state.cut is not None:
            # Not the rows that pad the sequence to a multiple of tp and cp.
            batch, rows, _ = gathered.x.shape
            real = state.length if state.cut is None else state.cut.real(state.whole_length)
            real -= state.rank * rows if self.whole_experts else 0
            index_Tk = index_Tk.view(batch, rows, -1)[:, : max(real, 0)]
        flat = index_Tk.detach().reshape(-1)
        counts = flat.new_zeros(count + 1)
        state.load[self.form.path] = counts.scatter_add_(0, flat, torch.ones_like(flat))[:count]


class SharedBoundary(BlockBoundary):
    """Entry and exit of a shared expert that is a TP block of its own, on flattened tokens.

    The order of the tokens does not matter to it: it gathers the ranks' ``[T, H]`` as they lie.
    ``around`` is the block that it is a part of.
    """

    def __init__(
        self, state: ParallelState, block: BlockInput, columns: list[Any], around: SparseBoundary
    ) -> None:
        super().__init__(state, block, columns, attention=False)
        self.around, self.flat = around, True

    def enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """All-gather ``[T, H]`` to ``[1, tp * T, H]``, or ``[B, s, H]`` along s."""
        x = get_hidden_states(args, kwargs)
        self.around.port(module, x)
        self.flat = x.dim() == 2
        recompute, x = recompute_of(x), x.unsqueeze(0) if self.flat else x
        if recompute is not None:
            attach_reshaped(x, recompute)
        return super().enter(module, *replace_hidden_states(args, kwargs, x))

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Reduce-scatter, back to ``[T, H]``."""
        out = super().leave(module, args, output)
        return out.squeeze(0) if isinstance(out, Tensor) and self.flat else out


def attach_reshaped(x: Tensor, recompute: Recompute) -> None:
    """Let ``x`` be computed as another tensor is, whose values it has in its own shape."""
    again = functools.partial(_reshaped, function=recompute.function, shape=x.shape)
    attach_recompute(x, Recompute(again, recompute.inputs))


def _reshaped(*inputs: Tensor, function: Any, shape: torch.Size) -> Tensor:
    return function(*inputs).reshape(shape)
