"""What surrounds the decoder layers: embedding, final norm, head, and what is left over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hf_sp.errors import PlanError
from hf_sp.plan.source import known

_SCALED = {
    "gemma": "def forward(self, x): return super().forward(x) * self.scale.to(self.weight.dtype)"
}
Modules = Mapping[str, nn.Module]
"""All modules of a model by path."""


def inside(path: str, root: str) -> bool:
    """Whether a path is ``root`` or below it; everything is below ""."""
    return not root or f"{path}.".startswith(f"{root}.")


def owners(modules: Modules, root: str) -> Iterator[tuple[str, dict[str, nn.Parameter]]]:
    """Modules inside ``root`` that own parameters, with these by name."""
    for path, module in modules.items():
        if inside(path, root) and (own := dict(module.named_parameters(recurse=False))):
            yield path, own


def class_name(module: nn.Module) -> str:
    """A module's class, as messages name it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def find_embedding(model: Any, modules: Modules, decoder: str) -> str:
    """Path of the input embedding; it must be a plain one beside the layers."""
    module = model.get_input_embeddings()
    path = next(path for path, other in modules.items() if other is module)
    _check_embedding(module, path, decoder)
    return path


def find_beside(
    modules: Modules, decoder: str, styles: Mapping[str, str], known: set[str | None]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Embeddings besides the input's, and what is computed alike on all ranks, as the plan says."""
    keys = [key for key in styles if ".*." not in key and key in modules and key not in known]
    embeddings = tuple(key for key in keys if styles[key] == "embedding_rowwise")
    for path in embeddings:
        _check_embedding(modules[path], path, decoder)
    return embeddings, tuple(key for key in keys if styles[key] == "replicate")


def _check_embedding(module: Any, path: str, decoder: str) -> None:
    problem = ""
    scaled = type(module).__bases__ == (nn.Embedding,) and known(module, _SCALED) is not None
    if type(module) is not nn.Embedding and not scaled:
        problem = class_name(module)
    elif module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
        problem = "max_norm, sparse or scale_grad_by_freq is set"
    elif path.rpartition(".")[0] != decoder:
        problem = f"it is not a child of {decoder or 'the model'}, which owns the layers"
    if problem:
        raise PlanError(
            "the input embedding cannot be made vocab-parallel",
            where=path,
            got=problem,
            rule="a torch.nn.Embedding beside the decoder layers, plain or scaled as Gemma's",
        )


def find_head(model: Any, modules: Modules) -> str | None:
    """Path of the LM head, None for a model without one; it must be a plain linear."""
    module = model.get_output_embeddings()
    path = next((path for path, other in modules.items() if other is module), None)
    if path is not None and type(module) is not nn.Linear:
        raise PlanError(
            "the LM head cannot be made vocab-parallel",
            where=path,
            got=class_name(module),
            rule="a plain torch.nn.Linear",
        )
    return path


def find_final_norm(
    model: Any, modules: Modules, decoder: str, container: str, others: set[str]
) -> str:
    """Path of the decoder's final norm, where the sequence is gathered."""
    wide = {}
    for path, own in owners(modules, decoder):
        if inside(path, container) or path in others:
            continue
        matrices = any(p.dim() > 1 for p in own.values())
        # In a decoder that is the whole model, the head and other siblings would be found too.
        if decoder or not matrices:
            wide[path] = matrices
    if not wide:
        # A norm without weights: HF's pipeline plan names what maps hidden states to themselves.
        stages = getattr(model.config, "base_model_pp_plan", None) or {}
        same = [n for n, (into, out) in stages.items() if into == out == ["hidden_states"]]
        paths = [f"{decoder}.{name}".lstrip(".") for name in same]
        wide = {path: False for path in paths if path in modules}
    if list(wide.values()) != [False]:
        raise PlanError(
            "the decoder's final norm could not be determined",
            where=decoder or "the model",
            got=", ".join(sorted(wide)) or "no module with weights besides the layers",
            rule="beside the embedding and the layers, the decoder owns one module with "
            "per-feature weights: the final norm, where the sequence is gathered",
        )
    return next(iter(wide))


def find_outside(modules: Modules, decoder: str, known: set[str | None]) -> tuple[str, ...]:
    """Modules with weights outside the decoder (a classifier): computed alike on all ranks."""
    outside = [path for path, _ in owners(modules, "") if not inside(path, decoder)]
    return tuple(path for path in outside if path not in known)


def check_linear(path: str, module: nn.Module) -> None:
    """Refuse (PlanError) what is not a plain linear."""
    # Subclasses (quantised, adapters) keep their weights in forms that cannot be sliced.
    if type(module) is not nn.Linear or {*module._parameters} != {"weight", "bias"}:
        raise PlanError(
            "a linear of the plan is not a plain torch.nn.Linear",
            where=path,
            got=class_name(module),
            rule="hf_sp shards plain linears; quantised or wrapped ones are not sliced",
            remedy="parallelize the model before it is quantised or given adapters",
        )
