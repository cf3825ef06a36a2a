"""What surrounds the decoder layers: embedding, final norm, head, and what is left over."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_sp.errors import PlanError


def _path_of(modules: dict[str, nn.Module], wanted: nn.Module) -> str:
    return next(path for path, module in modules.items() if module is wanted)


def find_embedding(model: Any, modules: dict[str, nn.Module], decoder: str) -> str:
    """Path of the input embedding; it must be a plain one beside the layers."""
    module = model.get_input_embeddings()
    path = _path_of(modules, module)
    problem = ""
    if type(module) is not nn.Embedding:
        problem = f"{type(module).__module__}.{type(module).__qualname__}"
    elif module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        problem = "max_norm, sparse or scale_grad_by_freq is set"
    elif path.rpartition(".")[0] != decoder:
        problem = f"it is not a child of {decoder or 'the model'}, which owns the layers"
    if problem:
        raise PlanError(
            "the input embedding cannot be made vocab-parallel",
            where=path,
            got=problem,
            rule="a plain torch.nn.Embedding beside the decoder layers",
        )
    return path


def find_head(model: Any, modules: dict[str, nn.Module]) -> str | None:
    """Path of the LM head, None for a model without one; it must be a plain linear."""
    module = model.get_output_embeddings()
    if module is None:
        return None
    path = _path_of(modules, module)
    if type(module) is not nn.Linear:
        raise PlanError(
            "the LM head cannot be made vocab-parallel",
            where=path,
            got=f"{type(module).__module__}.{type(module).__qualname__}",
            rule="a plain torch.nn.Linear",
        )
    return path


def find_final_norm(
    model: Any, modules: dict[str, nn.Module], decoder: str, container: str, embedding: str
) -> str:
    """Path of the decoder's final norm, where the sequence is gathered."""
    prefix = f"{decoder}." if decoder else ""
    known = (container, embedding)
    candidates = {
        path
        for path, module in modules.items()
        if path.startswith(prefix)
        and path not in known
        and not path.startswith(tuple(f"{k}." for k in known))
        # Without a prefix the head and other siblings would be found too: keep to 1-D weights.
        and list(module.parameters(recurse=False))
        and (decoder or all(p.dim() == 1 for p in module.parameters(recurse=False)))
    }
    if not candidates:
        # A norm without weights: HF's pipeline plan names what maps hidden states to themselves.
        stages = getattr(model.config, "base_model_pp_plan", None) or {}
        same = [n for n, (into, out) in stages.items() if into == out == ["hidden_states"]]
        candidates = {prefix + name for name in same if prefix + name in modules}
    wide = [p for p in candidates if any(w.dim() > 1 for w in modules[p].parameters(recurse=False))]
    if len(candidates) != 1 or wide:
        raise PlanError(
            "the decoder's final norm could not be told",
            where=decoder or "the model",
            got=", ".join(sorted(candidates)) or "no module with weights besides the layers",
            rule="beside the embedding and the layers, the decoder owns one module with "
            "per-feature weights: the final norm, where the sequence is gathered",
        )
    return candidates.pop()


def find_outside(
    modules: dict[str, nn.Module], decoder: str, known: set[str | None]
) -> tuple[str, ...]:
    """Modules with weights outside the decoder (a classifier): computed alike on all ranks."""
    if not decoder:
        return ()
    return tuple(
        path
        for path, module in modules.items()
        if path not in known
        and path != decoder
        and not path.startswith(decoder + ".")
        and list(module.parameters(recurse=False))
    )
