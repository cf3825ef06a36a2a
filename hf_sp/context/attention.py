"""The attention that decoder layers call where the sequence is cut over context parallel ranks.

It is registered with transformers like any other, under a name that an attention module's own
config gives; everything else, the masks too, goes by the name of the implementation that the user
has chosen, and that this one calls on whole sequences.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from hf_sp.comm.parts import Parts
from hf_sp.context.ulysses import to_heads, to_sequence
from hf_sp.model.block import CACHES
from hf_sp.model.local import LocalConfig
from hf_sp.state import ParallelState

PREFIX = "hf_sp|"


class ContextConfig(LocalConfig):
    """An attention module's config: another attention, in front of the one that the user chose."""

    def __init__(self, module: nn.Module, state: ParallelState) -> None:
        forward = inspect.unwrap(type(module).forward)
        known, given = forward.__globals__, inspect.signature(forward).parameters
        super().__init__(
            module.__dict__["config"],
            state=state,
            length=0,  # of the whole sequence, in the current call
            # What the module's own code looks for the attention in, and else calls.
            interface=known["ALL_ATTENTION_FUNCTIONS"],
            eager=known["eager_attention_forward"],
            # By name it is used beside the projections; among the rest it goes to the attention.
            takes_positions="position_ids" in given,
        )

    def own(self, kwargs: dict[str, Any], length: int, parts: Parts) -> dict[str, Any]:
        """The module's arguments, of a whole sequence, for projections of this rank's part.

        Masks stay whole: the attention itself sees the whole sequence. A cache does not: it is for
        forwards that asked for one, which are not cut.
        """
        self.__dict__["length"] = length
        own: dict[str, Any] = {name: None for name in CACHES if kwargs.get(name) is not None}
        found = kwargs.get("position_embeddings")
        if isinstance(found, Tensor):
            own["position_embeddings"] = parts.take(found, -2)
        elif found is not None:
            own["position_embeddings"] = tuple(parts.take(x, -2) for x in found)
        positions = kwargs.get("position_ids")
        if positions is not None and self.__dict__["takes_positions"]:
            own["position_ids"] = parts.take(positions, -1)
        return {**kwargs, **own}

    @property
    def _attn_implementation(self) -> str:
        # Who looks for "flash" in it finds it.
        name = f"{PREFIX}{self.__dict__['whole']._attn_implementation}"
        if name not in _registered:
            AttentionInterface.register(name, attend)
            _registered.add(name)
        return name


_registered: set[str] = set()


def install(module: nn.Module, state: ParallelState) -> ContextConfig:
    """Put it in front of a module's attention."""
    config = ContextConfig(module, state)
    setattr(module, "config", config)  # noqa: B010 (no attribute of nn.Module)
    # Registered now: a compiler would not see it done.
    assert config._attn_implementation
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
    config = module.__dict__["config"].__dict__
    function = config["interface"].get_interface(
        config["whole"]._attn_implementation, config["eager"]
    )
    parts = config["state"].cut
    if parts is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    heads, own = query.shape[1], query.shape[1] // parts.axis.size
    q, k, v = to_heads(query, key, value, config["length"], parts)
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
