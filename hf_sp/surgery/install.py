"""Put the hooks on a model whose leaves are swapped."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_sp.layers.head import CausalLMLoss
from hf_sp.layers.linear import ColumnParallelLinear
from hf_sp.plan.schema import Plan
from hf_sp.state import ParallelState
from hf_sp.surgery.boundary import BlockBoundary, StackEntry, StackExit
from hf_sp.surgery.forward import DecoderBoundary, ModelBoundary
from hf_sp.surgery.parameters import LocalParameters


def install_hooks(model: nn.Module, plan: Plan, state: ParallelState) -> None:
    """Boundaries of the stack and of each block, local views of replicated parameters, the loss."""
    for block in plan.blocks:
        module = model.get_submodule(block.path)
        leaves = [model.get_submodule(leaf.path) for leaf in block.leaves]
        columns = [leaf for leaf in leaves if isinstance(leaf, ColumnParallelLinear)]
        BlockBoundary(state, columns, block.attention).install(module)
        for path in block.partial:
            LocalParameters(state, "always").install(model.get_submodule(path))
    for path in plan.shard_norms:
        kind = "in decoder" if path == plan.norm else "sharded"
        LocalParameters(state, kind).install(model.get_submodule(path))
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


def _install_loss(model: nn.Module) -> None:
    # A loss function that the user has set is theirs: it gets logits. HF's is looked up by name.
    original: Any = getattr(model, "loss_function", None)
    if getattr(original, "__name__", "") == "ForCausalLMLoss":
        setattr(model, "loss_function", CausalLMLoss(original))  # noqa: B010 (HF's property)
