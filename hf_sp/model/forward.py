"""Hooks around the decoder and around the whole model: what a forward starts and leaves with."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.comm.parts import gather_heads
from hf_sp.errors import ConfigError
from hf_sp.model.block import CACHES, whole_hidden
from hf_sp.model.head import CausalLMLoss, VocabParallelHead
from hf_sp.model.input_checks import check_forward
from hf_sp.model.lazy import LazyLogits
from hf_sp.model.streams import SharedStream
from hf_sp.plan.schema import Plan
from hf_sp.state import ParallelState
from hf_sp.torch_private import has_global_hooks

SHARD_FROM = 8 * 2**20
"""Bytes of a rank's hidden states from which a prefill is sharded; vLLM's rule, for H100s."""

# The decoder's argument, until transformers 5.23 and since.
_CACHE = ("past_key_values", "cache")


def _bind(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name, positional ones too."""
    if not args:
        return kwargs
    names = inspect.signature(module.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


class _Boundary:
    """Two hooks on a module. The second also runs, to clean up, if the forward raises."""

    def install(self: Any, module: nn.Module) -> None:
        """Register both."""
        module.register_forward_pre_hook(self.start, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.finish, prepend=True, always_call=True)


class DecoderBoundary(_Boundary):
    """Hooks of the decoder: set the length, gather what is recorded inside the stack.

    ``output_hidden_states`` and ``output_attentions`` are recorded by HF's own hooks on the layers,
    which see sequence shards and local heads; they are gathered here, on the way out.
    """

    def __init__(
        self, state: ParallelState, model: nn.Module, leave_router_logits: Callable[..., Any]
    ) -> None:
        self.state, self.model, self.leave_router_logits = state, model, leave_router_logits
        self._as_tuple = False
        self._batch = 0
        self.stream = SharedStream(state)

    def start(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Note the whole sequence length; decode, and fill short caches, without shards."""
        state, inputs = self.state, _bind(module, args, kwargs)
        if not state.in_model:
            check_forward(self.model, state, inputs)
            self.stream.start(self.model)
        tokens = inputs.get("inputs_embeds")
        tokens = inputs.get("input_ids") if tokens is None else tokens
        self._batch, state.length = (0, None) if tokens is None else tokens.shape[:2]
        state.whole_length = state.length or 0
        # Never in training, where a checkpointed layer may run again after this forward is over.
        state.few_tokens = not torch.is_grad_enabled() and self._few_tokens(inputs)
        if state.parts is not None and state.length is not None:
            if not state.in_model:
                state.uncut = _fills_a_cache(inputs)
            state.uncut |= state.few_tokens
            if not state.uncut:
                state.length = state.parts.length(state.length)
        as_dict = kwargs.get("return_dict")
        self._as_tuple = not (module.config.return_dict if as_dict is None else as_dict)
        if state.sharded:
            changed = self._of_own_tokens(inputs)
            args, kwargs = ((), {**inputs, **changed}) if changed else (args, kwargs)
        return (args, {**kwargs, "return_dict": True}) if self._as_tuple else (args, kwargs)

    def _of_own_tokens(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs that the layers, or the loop over them, read beside their shards."""
        changed: dict[str, Any] = {}
        if inputs.get("logits_to_keep"):
            # Some cut the hidden states here already. The head cuts what it gets.
            changed["logits_to_keep"] = 0
        mask, added = inputs.get("visual_pos_masks"), inputs.get("deepstack_visual_embeds")
        if mask is not None and added is not None:
            # What is added to the places of pictures behind the first layers: each rank's own.
            axis, places = self.state.axis, mask.nonzero()[:, 1]
            rows = comm.padded(mask.shape[1], axis.size) // axis.size
            own = places // rows == axis.rank
            changed["visual_pos_masks"] = comm.own_shard(mask[..., None], axis)[..., 0]
            changed["deepstack_visual_embeds"] = [
                pairs.identity_allreduce(x, axis)[own] for x in added
            ]
        return changed

    def _few_tokens(self, inputs: dict[str, Any]) -> bool:
        """Whether a forward without gradients is better off with plain TP.

        One token: all but one rank would get padding. A prefill (someone hands a cache in) of few:
        one small all-reduce is sooner done than a reduce-scatter and an all-gather. The same on
        every rank, which all have the same batch.
        """
        state, length = self.state, self.state.length
        cached = any(inputs.get(name) is not None for name in _CACHE)
        if length is None or length == 1 or not cached:
            return length == 1
        weight: Any = self.model.get_submodule(state.plan.embedding).weight
        size = self._batch * length * weight.shape[1] * weight.element_size()
        return size < SHARD_FROM * state.tp

    def finish(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Gather the recorded hidden states (sequence) and attention weights (heads)."""
        state = self.state
        try:
            if state.length is None or not hasattr(output, "get"):
                return None
            self._gather(output)
            return output.to_tuple() if self._as_tuple else output
        finally:
            state.length, state.few_tokens = None, False
            state.uncut &= state.in_model
            state.delivered = (None, None)
            self.stream.stop()

    def _gather(self, output: Any) -> None:
        state, last = self.state, output.get("last_hidden_state")
        # FSDP hangs hooks on what leaves the model. On a view an in-place operation would drop
        # them: it warns of each.
        own = torch.clone if state.fsdp else lambda x: x
        routed = output.get("router_logits")
        if routed is not None:
            routed = self.leave_router_logits(routed, state, self._batch)
            output["router_logits"] = tuple(map(own, routed))

        def hidden(x: Tensor) -> Tensor:
            whole = x is last or not (state.sharded or state.cut)
            return x if whole else own(whole_hidden(x, state))

        def heads(x: Tensor) -> Tensor:
            if state.cut is not None:
                x = gather_heads(x, state.cut)
            return pairs.concat_slice(x, 1, (x.shape[1],) * state.tp, state.axis)

        if state.cut is not None:
            # Nothing was put into it: its keys and values would be of a part.
            for name in CACHES:
                if name in output:
                    output[name] = None

        for name, gather in (("hidden_states", hidden), ("attentions", heads)):
            if output.get(name) is not None:
                output[name] = tuple(x if x is None else gather(x) for x in output[name])


def _fills_a_cache(inputs: dict[str, Any]) -> bool:
    """Whether a forward was asked for a cache, beyond the config's default.

    One that records gradients makes none: these are sums over the parts.

    Raises:
        ConfigError: such a forward was given a cache.
    """
    given = [n for n in CACHES if inputs.get(n) is not None]
    if not torch.is_grad_enabled():
        return bool(given) or inputs.get("use_cache") is True
    if given:
        raise ConfigError(
            "a forward with gradients was given a cache",
            got=given[0],
            rule="with cp > 1 each rank has keys and values of its part of the sequence only",
            remedy="leave it out of training; under torch.no_grad() every rank fills it with all",
        )
    return False


class ModelBoundary(_Boundary):
    """Hooks of the whole model: compare the inputs, decide what becomes of the lazy logits."""

    def __init__(self, state: ParallelState) -> None:
        self.state, self.stream = state, SharedStream(state)

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compare the inputs over the ranks; the head may be lazy from here on."""
        inputs = _bind(module, args, kwargs)
        check_forward(module, self.state, inputs)
        self.stream.start(module)
        if self.state.parts is not None:
            self.state.uncut = _fills_a_cache(inputs)
        self.state.in_model = True
        loss_alone = (
            inputs.get("labels") is not None
            and isinstance(getattr(module, "loss_function", None), CausalLMLoss)
            and not self._logits_wanted(module)
        )
        self.state.final_hidden = final_hidden(module, self.state, inputs, loss_alone)

    def _logits_wanted(self, module: nn.Module) -> bool:
        return self.state.keep_logits if module.training else self.state.logits_wanted

    def finish(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Make the logits that someone may read; drop those that a training step does not."""
        self.state.in_model, self.state.final_hidden = False, "gathered"
        self.state.final_length, self.state.uncut = None, False
        self.stream.stop()
        if isinstance(output, tuple):
            # Logits that are not made leave their place to None: the others keep theirs.
            has_loss = len(output) > 1 and isinstance(output[1], LazyLogits)
            return tuple(self._resolve(x, module, has_loss) for x in output)
        if hasattr(output, "get"):
            has_loss = output.get("loss") is not None
            for name, x in list(output.items()):
                if isinstance(x, LazyLogits):
                    output[name] = self._resolve(x, module, has_loss)
        return output

    def _resolve(self, x: Any, module: nn.Module, has_loss: bool) -> Any:
        if not isinstance(x, LazyLogits):
            return x
        return None if has_loss and not self._logits_wanted(module) else x.materialize()


def final_hidden(
    model: nn.Module, state: ParallelState, inputs: dict[str, Any], head_alone: bool
) -> Literal["gathered", "shard"]:
    """What the final norm returns in a forward of the whole model.

    ``head_alone``: whether nothing is asked for but what the head makes of it by chunks.
    """
    if not head_alone or _watched(model, state.plan):
        return "gathered"
    # A slice that keeps the last positions is of the whole sequence.
    keep = inputs.get("logits_to_keep")
    modules = (model, model.get_submodule(state.plan.decoder))
    asked = [getattr(m.config, "output_hidden_states", None) for m in modules]
    asked.append(inputs.get("output_hidden_states"))
    # 0 asks for the first of them.
    recorded = any(a is not None and a is not False for a in asked)
    return "gathered" if isinstance(keep, Tensor) or keep or recorded else "shard"


def _watched(model: nn.Module, plan: Plan) -> bool:
    """Whether code that we do not know would meet the final hidden states inside the forward.

    Someone's hooks on the final norm, on the decoder and what holds it, or on the head; a forward
    that was replaced, or that is not transformers' own; an adapter on the head.
    """
    if plan.head is None or has_global_hooks():
        return True
    head = model.get_submodule(plan.head)
    own = type(model).forward.__module__.startswith("transformers.")
    if not own or not isinstance(head, VocabParallelHead):
        return True
    found = list(head._forward_pre_hooks.values())
    holders = itertools.accumulate(plan.decoder.split("."), "{}.{}".format)
    for module in map(model.get_submodule, (plan.norm, plan.head, *holders)):
        for hooks in (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks):
            found += hooks.values()
        found += [vars(module)["forward"]] if "forward" in vars(module) else []
    owners = [getattr(hook, "__self__", hook) for hook in found]
    modules = [getattr(owner, "__module__", None) or type(owner).__module__ for owner in owners]
    return not all(name.startswith("hf_sp.") for name in modules)
