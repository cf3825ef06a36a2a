"""Put the hooks, and the forwards of what is known, on a model whose parameters are sharded."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from hf_sp.context import attention as context
from hf_sp.context.mixer import OwnHeads
from hf_sp.model.block import BlockBoundary, LengthAlone, OwnTokens, StackBoundary
from hf_sp.model.embedding import Rows, VocabParallelEmbedding
from hf_sp.model.forward import DecoderBoundary, ModelBoundary
from hf_sp.model.head import CausalLMLoss, VocabParallelHead
from hf_sp.model.linear import ColumnParallelLinear, RowParallelLinear
from hf_sp.model.local import LocalConfig
from hf_sp.model.mixer import MixerBoundary, install_own_rows
from hf_sp.model.mlp import SwiGLUForward
from hf_sp.model.norm import NormForward
from hf_sp.model.norm_over_heads import OverHeadsForward
from hf_sp.model.parameters import LocalParameters, Partial, PartialSums
from hf_sp.model.ports import BlockInput
from hf_sp.model.streams import LayerDropout
from hf_sp.model.tiles import SequenceTiles
from hf_sp.moe.block import SharedBoundary, SparseBoundary
from hf_sp.moe.layer_experts import LayerExperts
from hf_sp.moe.router import leave_router_logits
from hf_sp.plan.known_forms import gated_form, norm_form
from hf_sp.plan.outer import inside
from hf_sp.plan.schema import Block, Leaf, Plan
from hf_sp.state import ParallelState
from hf_sp.torch_private import allow_graphs


def install(model: nn.Module, state: ParallelState) -> None:
    """Convert the leaves; install the boundaries of the stack and of each block, and the loss."""
    plan = state.plan
    kinds: dict[str, Partial] = {}
    owners: dict[str, tuple[nn.Module, LocalParameters]] = {}
    for block in plan.blocks:
        install_block = _install_block if block.experts is None else _install_sparse
        install_block(model, block, state)
        kinds |= dict.fromkeys(block.partial, Partial.HEADS)
        if block.of_heads:
            LocalParameters(state, Partial.NEVER).install(model.get_submodule(block.path))
        for path in block.over_heads:
            OverHeadsForward.install(model.get_submodule(path), state.axis)
        owners |= install_own_rows(model, block, state)
    kinds |= dict.fromkeys(plan.shard_norms, Partial.TOKENS)
    kinds[plan.norm] = Partial.DECODER_TOKENS
    owners |= {path: _install_norm(model, path, state, kind) for path, kind in kinds.items()}
    for path in plan.replicated:
        _install_outside(model, path, state)
    last = None
    for path in plan.layers:
        own = [owner for name, owner in owners.items() if name.startswith(path + ".")]
        sums = PartialSums(state, own)
        sums.install(model.get_submodule(path))
        if plan.dropout:
            blocks = [block for block in plan.blocks if block.path.startswith(path + ".")]
            rows = [one.path for b in blocks for one in b.leaves if one.style == "row"]
            found = [
                [model.get_submodule(p) for p in ps] for ps in ([b.path for b in blocks], rows)
            ]
            LayerDropout(state).install(model.get_submodule(path), *found)
        if plan.per_token:
            OwnTokens(state, plan.per_token).install(model.get_submodule(path))
        if last is not None and not state.fsdp:
            # FSDP reduces a layer's gradients at the end of its backward: they have to be there.
            last.next = sums
        last = sums
    _install_ends(model, plan, state)
    # A few for each layer: lengths that differ, with and without gradients.
    allow_graphs(8 * len(plan.layers))


def _owned(module: nn.Module) -> set[str]:
    return {name for name, p in module._parameters.items() if p is not None}


def _install_ends(model: nn.Module, plan: Plan, state: ParallelState) -> None:
    for path in (plan.embedding, *plan.embeddings):
        embedding: Any = model.get_submodule(path)
        own = state if path == plan.embedding else None
        VocabParallelEmbedding.convert_(embedding, state.axis, own)
    if around := plan.decoder.rpartition(".")[0]:
        Rows.install(model.get_submodule(plan.embedding), model.get_submodule(around))
    first, norm = (model.get_submodule(path) for path in (plan.layers[0], plan.norm))
    StackBoundary(state).install(first, norm)
    decoder = model.get_submodule(plan.decoder)
    DecoderBoundary(state, model, leave_router_logits).install(decoder)
    if getattr(decoder, "rotary_emb", decoder) is None:
        for path in plan.layers:
            LengthAlone.install(model.get_submodule(path), state)
    if plan.ring > 1:
        context.DecoderConfig(state).install(decoder)
    if decoder is not model:
        ModelBoundary(state).install(model)
    if plan.head is None:
        return
    head: Any = model.get_submodule(plan.head)
    VocabParallelHead.convert_(head, state)
    # A loss function that the user has set is theirs: it gets logits. HF's is looked up by name.
    original: Any = getattr(model, "loss_function", None)
    if getattr(original, "__name__", "") == "ForCausalLMLoss":
        setattr(model, "loss_function", CausalLMLoss(original))  # noqa: B010 (HF's property)


def _install_block(model: nn.Module, block: Block, state: ParallelState) -> None:
    module, shared = model.get_submodule(block.path), BlockInput()
    columns = _convert(model, block.leaves, state, shared, sp=state.sp)
    _install_alike(model, block, state)
    if block.mixer is not None:
        mixer = MixerBoundary(state, shared, columns, block)
        if state.parts is not None:
            mixer.exchange = OwnHeads(module, block, state.tp)
        mixer.install(module)
        layer = next(path for path in state.plan.layers if block.path.startswith(path + "."))
        model.get_submodule(layer).register_forward_pre_hook(mixer.note, with_kwargs=True)
        return
    heads = next((leaf.heads for leaf in block.leaves if leaf.style == "row"), 0)
    boundary = BlockBoundary(state, shared, columns, block.attention, heads)
    boundary.install(module)
    if not block.attention:
        _install_gated(module, block.path, block.leaves, state)
        if state.mlp_tile is not None:
            SequenceTiles(state.mlp_tile).install(module)
    else:
        _tell_heads(module, block, state.tp)
        if state.parts is not None:
            names = tuple(path.rpartition(".")[2] for path in block.of_heads)
            boundary.own = context.install(module, state, names).own


def _install_outside(model: nn.Module, path: str, state: ParallelState) -> None:
    module, parameters = model.get_submodule(path), LocalParameters(state, Partial.NEVER)
    parameters.install(module)
    around = path.rpartition(".")[0]
    if not inside(state.plan.layers[0], around):
        # Some read what a child owns, and do not call it.
        owner = model.get_submodule(around)
        owner.register_forward_pre_hook(functools.partial(parameters.hold, module))
        release = functools.partial(parameters.release, module)
        owner.register_forward_hook(release, always_call=True)


def _install_alike(model: nn.Module, block: Block, state: ParallelState) -> None:
    for path in block.alike:
        LocalParameters(state, Partial.NEVER).install(model.get_submodule(path))


def _tell_heads(module: nn.Module, block: Block, tp: int) -> None:
    """Tell an attention how many heads it has on this rank, where it asks."""
    heads = [leaf.heads for leaf in block.leaves if leaf.heads and leaf.style != "row"]
    query = next(leaf.heads for leaf in block.leaves if leaf.style == "row")
    # Some use the keys and values of a layer before.
    whole = query // module.__dict__.get("num_key_value_groups", 1)
    own, key_value = query // tp, max(1, min(*heads, whole) // tp)
    local = {"num_heads": own, "num_attention_heads": own, "num_key_value_heads": key_value}
    local["num_key_value_groups"] = own // key_value
    for name, count in local.items():
        if name in module.__dict__:
            setattr(module, name, count)
    if any(leaf.segments for leaf in block.leaves):
        # What cuts its q, k and v out of one tensor asks its config too.
        config = LocalConfig(module.__dict__["config"], **local)
        setattr(module, "config", config)  # noqa: B010 (no attribute of nn.Module)


def _install_sparse(model: nn.Module, block: Block, state: ParallelState) -> None:
    assert block.experts is not None
    module, shared, path = model.get_submodule(block.path), BlockInput(), block.experts.shared
    _install_alike(model, block, state)
    if not block.experts.router:
        LayerExperts(state, module, block).install(module)
        return
    # A sparse block works on flattened tokens, batch-major.
    columns = _convert(model, block.leaves, state, shared, sp=False)
    boundary = SparseBoundary(state, module, block, columns)
    boundary.install(module)
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
    columns: list[ColumnParallelLinear] = []
    for leaf in leaves:
        module: Any = model.get_submodule(leaf.path)
        if leaf.style == "row":
            RowParallelLinear.convert_(module, state.axis, block, sp=sp)
        else:
            rows = leaf.rows(state.tp, state.rank)
            segments = leaf.segments if rows is None else ()
            ColumnParallelLinear.convert_(module, state.axis, block, rows, segments=segments)
            columns.append(module)
    return columns


def _install_norm(
    model: nn.Module, path: str, state: ParallelState, partial: Partial
) -> tuple[nn.Module, LocalParameters]:
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
    """Replace the forward of a block that is a gated MLP of a known form."""
    names = {leaf.path.removeprefix(f"{path}."): leaf.style for leaf in leaves}
    rows = [name for name, style in names.items() if style == "row"]
    if not state.fused or len(rows) != 1:
        return
    form = gated_form(module, [name for name in names if name not in rows], rows[0])
    if form is not None:
        recompute = state.recompute == "norm+act"
        forward = SwiGLUForward(module, form, recompute=recompute, triton=state.kernels)
        setattr(module, "forward", forward)  # noqa: B010 (a method to mypy)
