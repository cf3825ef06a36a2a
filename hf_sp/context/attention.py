"""The attention that decoder layers call where the sequence is cut over context parallel ranks.

It is registered with transformers like any other, under a name that an attention module's own
config gives. Without a ring everything else, the masks too, goes by the name of the implementation
that the user has chosen, and that this one calls on whole sequences. With a ring the decoder's own
config gives that name too, during its forward: masks are asked of ``masks.describe``.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface

from hf_sp.comm.collectives import Axis
from hf_sp.comm.parts import Parts
from hf_sp.context.masks import Band, Given, Mask, describe
from hf_sp.context.ring import ring_attention
from hf_sp.context.ulysses import to_heads, to_sequence
from hf_sp.errors import ConfigError
from hf_sp.model.block import CACHES
from hf_sp.model.local import LocalConfig, cast_for_autocast
from hf_sp.state import ParallelState
from hf_sp.torch_private import is_view

PREFIX = "hf_sp|"


class _Named(LocalConfig):
    @property
    def _attn_implementation(self) -> str:
        # Who looks for "flash" in it finds it.
        name = f"{PREFIX}{self.__dict__['whole']._attn_implementation}"
        if name not in _registered:
            AttentionInterface.register(name, attend)
            AttentionMaskInterface.register(name, describe)
            _registered.add(name)
        return name


class ContextConfig(_Named):
    """An attention module's config: another attention, in front of the one that the user chose."""

    def __init__(
        self, module: nn.Module, state: ParallelState, of_heads: tuple[str, ...] = ()
    ) -> None:
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
            of_heads=of_heads,
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
            own["position_embeddings"] = _of_part(found, parts)
        elif found is not None:
            own["position_embeddings"] = tuple(_of_part(x, parts) for x in found)
        positions = kwargs.get("position_ids")
        if positions is not None and self.__dict__["takes_positions"]:
            own["position_ids"] = parts.take(positions, -1)
        return {**kwargs, **own}


def _of_part(x: Tensor, parts: Parts) -> Tensor:
    """A part of what all layers are given: one for all of them, as each would keep its own."""
    own = _taken.get(x)
    if own is None:
        own = parts.take(x, -2)
        if not is_view(own):
            _taken[x] = own
    return own


# Lives as long as what it is of.
_taken = WeakTensorKeyDictionary()
_registered: set[str] = set()


class DecoderConfig:
    """Hooks of the decoder of a ring: its config names our masks in forwards that are cut."""

    def __init__(self, state: ParallelState) -> None:
        self.state = state

    def install(self, module: nn.Module) -> None:
        """Register both. The second also runs if the forward raises."""
        module.register_forward_pre_hook(self.start, with_kwargs=True)
        module.register_forward_hook(self.finish, always_call=True)

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Name them."""
        if self.state.cut is None:
            return
        config = module.__dict__["config"]
        asked = kwargs.get("output_attentions")
        if config.output_attentions if asked is None else asked:
            raise _refusal("output_attentions=True", "no rank ever has the weights of a row")
        module.__dict__["config"] = _Named(config)

    def finish(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give the config back."""
        if isinstance(config := module.__dict__["config"], _Named):
            module.__dict__["config"] = config.__dict__["whole"]


def install(module: nn.Module, state: ParallelState, of_heads: tuple[str, ...]) -> ContextConfig:
    """Put it in front of a module's attention, which has parameters of a number for each head."""
    config = ContextConfig(module, state, of_heads)
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
    parts: Parts | None = config["state"].cut
    if parts is None:
        return function(module, query, key, value, attention_mask, **kwargs)
    S, P, axis = config["length"], query.shape[2], parts.ulysses
    heads, own = query.shape[1], query.shape[1] // axis.size
    if parts.ring > 1:
        # As autocast does in front of sdpa, which is not called.
        query, key, value = (cast_for_autocast(x, x) for x in (query, key, value))
    q, k, v = to_heads(query, key, value, parts.tokens(S), axis)
    of_heads = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4
    if of_heads and attention_mask.shape[1] == heads > 1:
        attention_mask = _of_rank(attention_mask, 1, own, axis)
    if parts.ring > 1:
        mask, scale = _ring_mask(module, attention_mask, S, kwargs), kwargs.get("scaling")
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return to_sequence(ring_attention(q, k, v, mask, scale, S, parts), P, axis), None
    told = module.__dict__
    whole: dict[str, Any] = {name: told[name] for name in config["of_heads"]}
    change: dict[str, Any] = {name: _of_rank(x, 0, own, axis) for name, x in whole.items()}
    # As arguments too: they are the same tensors.
    kwargs |= {n: change[name] for n, x in kwargs.items() for name, y in whole.items() if x is y}
    groups = getattr(module, "num_key_value_groups", None)
    if groups is not None and groups * k.shape[1] != own:
        whole["num_key_value_groups"], change["num_key_value_groups"] = groups, own // k.shape[1]
    told.update(change)
    try:
        out, weights = function(module, q, k, v, attention_mask, **kwargs)
    finally:
        told.update(whole)
    return to_sequence(out, P, axis), weights


def _of_rank(x: Tensor, dim: int, own: int, axis: Axis) -> Tensor:
    """What belongs to the heads that this rank attends with."""
    return x.narrow(dim, axis.rank * own, own)


# Of what code may hand to an attention function: what changes its numbers, and no ring knows.
_OTHER = ("s_aux", "sinks", "softcap", "position_bias", "indices", "block_indices", "cu_seq_lens_q")


def _ring_mask(module: nn.Module, mask: Any, S: int, kwargs: dict[str, Any]) -> Mask:
    """What a ring's queries see.

    Raises:
        ConfigError: the attention is asked for what a ring does not compute.
    """
    if other := [name for name in _OTHER if kwargs.get(name) is not None]:
        raise _refusal(", ".join(other), "it computes a softmax of scores, scaled and masked")
    if kwargs.get("dropout"):
        raise _refusal(f"dropout={kwargs['dropout']}", "it drops no weights")
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2:] == (S, S):
        return Given(mask)
    chosen = module.__dict__["config"].__dict__["whole"]._attn_implementation
    if mask is None and chosen == "sdpa":
        # As transformers' own reads it.
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        return Band(S, S, 0 if causal else S)
    got = f"{type(mask).__name__} for attn_implementation={chosen!r}"
    raise _refusal(got, "it knows transformers' masks, 4-D tensors, and what sdpa does without")


def _refusal(got: str, rule: str) -> ConfigError:
    return ConfigError(
        "ring attention cannot do what is asked of it",
        got=got,
        rule=rule,
        legal="cp_mode='ulysses'",
    )
