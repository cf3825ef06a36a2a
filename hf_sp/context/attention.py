"""The attention that decoder layers call where the sequence is cut over context parallel ranks.

It is registered with transformers like any other, under a name that an attention module's own
config gives; everything else, the masks too, goes by the name of the implementation that the user
has chosen, and that this one calls on whole sequences.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from hf_sp.context.ulysses import to_heads, to_sequence
from hf_sp.model.local import LocalConfig
from hf_sp.state import ParallelState

PREFIX = "hf_sp|"


class ContextConfig(LocalConfig):
    """An attention module's config: another attention, in front of the one that the user chose."""

    length: int = 0
    """Of the whole sequence, in the current call."""

    def __init__(self, config: Any, state: ParallelState) -> None:
        super().__init__(config, state=state)

    def tell(self, length: int) -> None:
        """Note the length of the whole sequence."""
        self.__dict__["length"] = length

    @property
    def _attn_implementation(self) -> str:
        # Who looks for "flash" in it finds it.
        return _registered(self.__dict__["whole"]._attn_implementation)


@functools.cache
def _registered(chosen: str) -> str:
    """The name of this attention in front of another."""
    AttentionInterface.register(f"{PREFIX}{chosen}", attend)
    return f"{PREFIX}{chosen}"


def install(module: nn.Module, state: ParallelState) -> ContextConfig:
    """Put it in front of a module's attention."""
    config = ContextConfig(module.__dict__["config"], state)
    setattr(module, "config", config)  # noqa: B010 (no attribute of nn.Module)
    return config


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Attention of this rank's tokens over the whole sequence.

    Shapes: query [B, n, P, D], key [B, m, P, D], value [B, m, P, E] -> [B, P, n, E], and what the
            implementation returns beside it, of ``n / cp`` heads and all tokens
    """
    config: Any = module.config
    function = _chosen(module, config.__dict__["whole"]._attn_implementation)
    parts = config.__dict__["state"].cut
    if parts is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    heads, own = query.shape[1], query.shape[1] // parts.axis.size
    q, k, v = to_heads(query, key, value, config.length, parts)
    of_heads = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4
    if of_heads and attention_mask.shape[1] == heads > 1:
        attention_mask = attention_mask.narrow(1, parts.axis.rank * own, own)
    groups = getattr(module, "num_key_value_groups", None)
    if groups is None or groups * k.shape[1] == own:
        out, weights = function(module, q, k, v, attention_mask, **kwargs)
    else:
        setattr(module, "num_key_value_groups", own // k.shape[1])  # noqa: B010
        try:
            out, weights = function(module, q, k, v, attention_mask, **kwargs)
        finally:
            setattr(module, "num_key_value_groups", groups)  # noqa: B010
    return to_sequence(out, parts), weights


def _chosen(module: nn.Module, name: str) -> Any:
    """What the module's own code would have called."""
    known = inspect.unwrap(type(module).forward).__globals__
    eager = known.get("eager_attention_forward")
    return known["ALL_ATTENTION_FUNCTIONS"].get_interface(name, eager)
