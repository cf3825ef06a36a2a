"""Put the hooks, and the forwards of what is recognised, on a model whose leaves are swapped."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_sp.model.block import BlockBoundary, StackEntry, StackExit
from hf_sp.model.forward import DecoderBoundary, ModelBoundary
from hf_sp.model.head import CausalLMLoss
from hf_sp.model.linear import ColumnParallelLinear
from hf_sp.model.norm import GatedForward, NormForward
from hf_sp.model.parameters import LocalParameters
from hf_sp.moe.block import SparseBoundary
from hf_sp.moe.shared import SharedBoundary
from hf_sp.plan.known_forms import gated_form, norm_form
from hf_sp.plan.schema import Block, Plan
from hf_sp.state import ParallelState


def install_hooks(model: nn.Module, plan: Plan, state: ParallelState) -> None:
    """Boundaries of the stack and of each block, local views of replicated parameters, the loss."""
    fused = _Fused(state)
    for block in plan.blocks:
        module = model.get_submodule(block.path)
        leaves = [model.get_submodule(leaf.path) for leaf in block.leaves]
        columns = [leaf for leaf in leaves if isinstance(leaf, ColumnParallelLinear)]
        if block.experts is None:
            BlockBoundary(state, columns, block.attention).install(module)
            fused.gated(module, block)
        else:
            _install_sparse(model, block, state, fused)
        for path in block.partial:
            fused.norm(model.get_submodule(path), LocalParameters(state, "always"))
    for path in plan.shard_norms:
        kind = "in decoder" if path == plan.norm else "sharded"
        fused.norm(model.get_submodule(path), LocalParameters(state, kind))
    for path in plan.replicated:
        LocalParameters(state, "never").install(model.get_submodule(path))
    first = model.get_submodule(plan.layers[0])
    first.register_forward_pre_hook(StackEntry(state), with_kwargs=True, prepend=True)
    model.get_submodule(plan.norm).register_forward_hook(StackExit(state), prepend=True)
    decoder = model.get_submodule(plan.decoder)
    DecoderBoundary(state, model).install(decoder)
    if decoder is not model:
        ModelBoundary(state).install(model)
    if plan.head is not None:
        _install_loss(model)


def _install_sparse(model: nn.Module, block: Block, state: ParallelState, fused: _Fused) -> None:
    boundary = SparseBoundary(state, model, block)
    boundary.install(model.get_submodule(block.path))
    assert block.experts is not None
    if not block.experts.shared:
        return
    path = block.experts.shared
    leaves = tuple(leaf for leaf in block.leaves if leaf.path.startswith(path + "."))
    shared = model.get_submodule(path)
    fused.gated(shared, Block(path, leaves))
    if boundary.own:
        modules = [model.get_submodule(leaf.path) for leaf in leaves]
        columns = [module for module in modules if isinstance(module, ColumnParallelLinear)]
        SharedBoundary(state, columns, boundary, False).install(shared)


class _Fused:
    """Gives norms and MLPs their stand-ins, where their maths is known and wanted."""

    def __init__(self, state: ParallelState) -> None:
        self.state = state

    def norm(self, module: nn.Module, parameters: LocalParameters) -> None:
        """A norm on the hidden stream or on this rank's heads."""
        state = self.state
        recompute = state.recompute != "none"
        form = norm_form(module) if state.fused else None
        if form is None:
            parameters.install(module)
            return
        forward = NormForward(module, form, parameters, recompute=recompute, triton=state.kernels)
        setattr(module, "forward", forward)  # noqa: B010 (a method to mypy)

    def gated(self, module: nn.Module, block: Block) -> None:
        """A TP block, which may be a gated MLP."""
        rows = [leaf.path for leaf in block.leaves if leaf.style == "row"]
        if not self.state.fused or block.attention or len(rows) != 1:
            return
        columns = [leaf.path for leaf in block.leaves if leaf.style != "row"]
        (row, *names) = (path.removeprefix(block.path + ".") for path in (*rows, *columns))
        form = gated_form(module, names, row)
        if form is not None:
            recompute = self.state.recompute == "norm+act"
            forward = GatedForward(module, form, recompute=recompute, triton=self.state.kernels)
            setattr(module, "forward", forward)  # noqa: B010 (a method to mypy)


def _install_loss(model: nn.Module) -> None:
    # A loss function that the user has set is theirs: it gets logits. HF's is looked up by name.
    original: Any = getattr(model, "loss_function", None)
    if getattr(original, "__name__", "") == "ForCausalLMLoss":
        setattr(model, "loss_function", CausalLMLoss(original))  # noqa: B010 (HF's property)
