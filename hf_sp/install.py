"""Put the hooks, and the forwards of what is known, on a model whose parameters are sharded."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_sp.model.block import BlockBoundary, StackBoundary
from hf_sp.model.embedding import VocabParallelEmbedding
from hf_sp.model.forward import DecoderBoundary, ModelBoundary
from hf_sp.model.head import CausalLMLoss, VocabParallelHead
from hf_sp.model.linear import ColumnParallelLinear, RowParallelLinear
from hf_sp.model.mlp import SwiGLUForward
from hf_sp.model.norm import NormForward
from hf_sp.model.parameters import LocalParameters, Partial, PartialSums
from hf_sp.model.ports import BlockInput
from hf_sp.moe.block import SharedBoundary, SparseBoundary
from hf_sp.moe.router import leave_router_logits
from hf_sp.plan.known_forms import gated_form, norm_form
from hf_sp.plan.schema import Block, Leaf, Plan
from hf_sp.state import ParallelState
from hf_sp.torch_private import allow_graphs

Norms = dict[str, tuple[nn.Module, LocalParameters]]


def install(model: nn.Module, plan: Plan, state: ParallelState) -> None:
    """Convert the leaves; install the boundaries of the stack and of each block, and the loss."""
    norms: Norms = {}
    for block in plan.blocks:
        if block.experts is None:
            _install_block(model, block, state)
        else:
            _install_sparse(model, block, state)
        for path in block.partial:
            norms[path] = _norm(model, path, state, Partial.HEADS)
    for path in plan.shard_norms:
        kind = Partial.DECODER_TOKENS if path == plan.norm else Partial.TOKENS
        norms[path] = _norm(model, path, state, kind)
    for path in plan.replicated:
        LocalParameters(state, Partial.NEVER).install(model.get_submodule(path))
    for path in plan.layers:
        inside = [norm for name, norm in norms.items() if name.startswith(path + ".")]
        single = [(m, local) for m, local in inside if set(m._parameters) == {"weight"}]
        PartialSums(state, single).install(model.get_submodule(path))
    _install_ends(model, plan, state)
    # A few for each layer: lengths that differ, with and without gradients.
    allow_graphs(8 * len(plan.layers))


def _install_ends(model: nn.Module, plan: Plan, state: ParallelState) -> None:
    embedding = model.get_submodule(plan.embedding)
    assert isinstance(embedding, nn.Embedding)
    VocabParallelEmbedding.take_over(embedding, state.axis)
    first, stack = model.get_submodule(plan.layers[0]), StackBoundary(state)
    first.register_forward_pre_hook(stack.enter, with_kwargs=True, prepend=True)
    model.get_submodule(plan.norm).register_forward_hook(stack.leave, prepend=True)
    decoder = model.get_submodule(plan.decoder)
    DecoderBoundary(state, model, leave_router_logits).install(decoder)
    if decoder is not model:
        ModelBoundary(state).install(model)
    if plan.head is not None:
        head = model.get_submodule(plan.head)
        assert isinstance(head, nn.Linear)
        VocabParallelHead.take_over(head, state)
        _install_loss(model)


def _install_block(model: nn.Module, block: Block, state: ParallelState) -> None:
    module, shared = model.get_submodule(block.path), BlockInput()
    columns = _convert(model, block.leaves, state, shared, sp=state.sp)
    BlockBoundary(state, shared, columns, block.attention).install(module)
    if block.attention:
        _set_local_groups(module, block.leaves, state)
    else:
        _install_gated(module, block.path, block.leaves, state)


def _install_sparse(model: nn.Module, block: Block, state: ParallelState) -> None:
    assert block.experts is not None
    shared = BlockInput()
    # A sparse block works on flattened tokens, batch-major.
    columns = _convert(model, block.leaves, state, shared, sp=False)
    boundary = SparseBoundary(state, model.get_submodule(block.path), block, columns)
    boundary.install(model.get_submodule(block.path))
    path = block.experts.shared
    if not path:
        return
    module = model.get_submodule(path)
    leaves = tuple(leaf for leaf in block.leaves if leaf.path.startswith(path + "."))
    _install_gated(module, path, leaves, state)
    if boundary.whole_experts:
        inside = [c for c in columns if any(c is m for m in module.modules())]
        SharedBoundary(state, shared, inside, boundary).install(module)


def _convert(
    model: nn.Module, leaves: tuple[Leaf, ...], state: ParallelState, block: BlockInput, *, sp: bool
) -> list[ColumnParallelLinear]:
    """Make the leaves parallel linears, in place; the column linears among them."""
    columns = []
    for leaf in leaves:
        module = model.get_submodule(leaf.path)
        assert isinstance(module, nn.Linear)
        if leaf.style == "row":
            RowParallelLinear.convert_(module, state.axis, block, sp=sp)
        else:
            heads = {"column_replicated": leaf.heads, "replicated": 1}.get(leaf.style, 0)
            ColumnParallelLinear.convert_(module, state.axis, block, heads)
            columns.append(module)
    return columns  # type: ignore[return-value]


def _set_local_groups(block: nn.Module, leaves: tuple[Leaf, ...], state: ParallelState) -> None:
    """Query heads per key/value head, as this rank sees them."""
    query = next(leaf.heads for leaf in leaves if leaf.style == "row")
    key_value = min(leaf.heads for leaf in leaves if leaf.style != "row")
    if hasattr(block, "num_key_value_groups"):
        groups = (query // state.tp) // max(1, key_value // state.tp)
        setattr(block, "num_key_value_groups", groups)  # noqa: B010 (no attribute of nn.Module)


def _norm(
    model: nn.Module, path: str, state: ParallelState, partial: Partial
) -> tuple[nn.Module, LocalParameters]:
    """A norm on the hidden stream or on this rank's heads."""
    module, parameters = model.get_submodule(path), LocalParameters(state, partial)
    form = norm_form(module) if state.fused else None
    if form is None:
        parameters.install(module)
    else:
        recompute = state.recompute != "none"
        forward = NormForward(module, form, parameters, recompute=recompute, triton=state.kernels)
        setattr(module, "forward", forward)  # noqa: B010 (a method to mypy)
    return module, parameters


def _install_gated(
    module: nn.Module, path: str, leaves: tuple[Leaf, ...], state: ParallelState
) -> None:
    """A TP block, which may be a gated MLP."""
    rows = [leaf.path for leaf in leaves if leaf.style == "row"]
    if not state.fused or len(rows) != 1:
        return
    columns = [leaf.path for leaf in leaves if leaf.style != "row"]
    (row, *names) = (leaf.removeprefix(path + ".") for leaf in (*rows, *columns))
    form = gated_form(module, names, row)
    if form is not None:
        recompute = state.recompute == "norm+act"
        forward = SwiGLUForward(module, form, recompute=recompute, triton=state.kernels)
        setattr(module, "forward", forward)  # noqa: B010 (a method to mypy)


def _install_loss(model: nn.Module) -> None:
    # A loss function that the user has set is theirs: it gets logits. HF's is looked up by name.
    original: Any = getattr(model, "loss_function", None)
    if getattr(original, "__name__", "") == "ForCausalLMLoss":
        setattr(model, "loss_function", CausalLMLoss(original))  # noqa: B010 (HF's property)
