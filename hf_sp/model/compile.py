"""``torch.compile`` of a parallelized model: each decoder layer by itself.

The hooks around the model compare batches over the ranks, and the loss runs in chunks: both stay
eager. A dense layer's forward is one graph. A layer with experts stays eager: torch's tracer fails
in the autograd Functions of its entry and its experts.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_sp.errors import ConfigError
from hf_sp.state import parallel_model, parallel_state


def compile_layers(model: nn.Module, **options: Any) -> None:
    """Compile the decoder layers in place, as ``layer.compile(fullgraph=True)`` on each does.

    Those without experts. There may be breaks between the graphs of one with attention dropout,
    which seeds its generator on the host, and where transformers records router logits.

    Args:
        model: a parallelized model, or what holds it.
        options: of ``torch.compile``.

    Raises:
        ConfigError: with context parallel ranks, or with MLPs in tiles.
    """
    state, whole = parallel_state(model), parallel_model(model)
    assert state is not None
    assert whole is not None
    if state.parts is not None:
        raise ConfigError(
            "layers over parts of a sequence are not compiled",
            got=str(state.degrees),
            rule="the exchange in front of their attention has not been traced",
            legal="torch_compile=False, or cp=1",
        )
    if state.mlp_tile is not None:
        raise ConfigError(
            "layers whose MLPs run in tiles are not compiled",
            got=f"mlp_tile={state.mlp_tile}",
            rule="a graph would have every tile's operations, and keep what they save",
            legal="torch_compile=False, or mlp_tile=None",
        )
    sparse = [block.path for block in state.plan.blocks if block.experts is not None]
    for path in state.plan.layers:
        if any(block.startswith(path + ".") for block in sparse):
            continue
        layer = whole.get_submodule(path)
        drops = any(float(getattr(m, "attention_dropout", 0) or 0) for m in layer.modules())
        layer.compile(**{**options, "fullgraph": not (drops or sparse)})
