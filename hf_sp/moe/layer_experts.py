"""Experts that a decoder layer owns itself, and calls with tokens that it has routed.

The layer runs on its rank's tokens (its router too, whose gradient is summed as a norm's is), so
that nothing is asked of what it does around its experts.

Shape letters: T tokens of the layer, k experts a token, H hidden.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.model.columns import Experts, gather_columns
from hf_sp.model.local import cast_for_autocast
from hf_sp.model.recompute import recompute_of
from hf_sp.moe.block import SparseBoundary, attach_reshaped
from hf_sp.moe.experts import gate_up_gradient
from hf_sp.plan.schema import Block
from hf_sp.state import ParallelState


class LayerExperts(SparseBoundary):
    """The forward of such experts.

    Split by features: one gather of tokens, choices and weights, one reduce-scatter. Whole experts:
    tokens travel, as in a sparse block.
    """

    def __init__(self, state: ParallelState, module: nn.Module, block: Block) -> None:
        self.prepare(state, module, block, [])

    def install(self, module: nn.Module) -> None:
        """Take the place of the forward."""
        setattr(module, "forward", self.call)  # noqa: B010 (a method to mypy)

    def call(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' whole output for the layer's tokens.

        Shapes:   tokens [T, H], top_k_index and top_k_weights [T, k] -> [T, H]
        Forward:  features: 3 all-gathers and 1 reduce-scatter, or without sp 1 all-reduce
        Backward: features: 2 all-gathers and 2 reduce-scatters, or 2 all-reduces
        """
        state, x = self.state, hidden_states
        if self.whole_experts:
            return self.run(x, top_k_index, top_k_weights)
        recompute, tokens = recompute_of(x), x.unsqueeze(0)
        if recompute is not None:
            attach_reshaped(tokens, recompute)
        index, scale, top_k = top_k_index, top_k_weights.unsqueeze(0), top_k_index.shape[-1]
        turned = self.form.transposed
        gradient = functools.partial(gate_up_gradient, top_k=top_k, transposed=turned)
        width = 2 * self.form.intermediate // state.tp
        weight = self.weight("gate_up_proj", cast_for_autocast(x, x))
        self.block.gathered = gather_columns(
            tokens,
            [],
            state.axis,
            sharded=state.sharded,
            length=None,
            batch_major=True,
            contiguous=True,
            experts=Experts(self.experts, weight, width, top_k, gradient),
        )
        if state.sharded:
            index = comm.all_gather(index.contiguous(), state.axis)
            scale = pairs.allgather_reducescatter(scale, None, state.axis)
        elif torch.is_grad_enabled():
            scale = pairs.identity_allreduce(scale, state.axis)
        out = self.run(self.block.gathered.x.flatten(0, 1), index, scale.flatten(0, 1))
        self.block.close()
        if not state.sharded:
            return pairs.allreduce_identity(out, state.axis)
        return pairs.reducescatter_allgather(out.unsqueeze(0), state.axis).squeeze(0)

    def _note_load(self, index_Tk: Tensor) -> None:
        """Count the tokens of each expert, rows that pad the sequence among them."""
        count, flat = self.form.count, index_Tk.detach().reshape(-1)
        if self.state.length is None:
            return
        counts = flat.new_zeros(count + 1)
        places: Any = torch.ones_like(flat)
        self.state.load[self.form.path] = counts.scatter_add_(0, flat, places)[:count]
