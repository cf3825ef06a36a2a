"""Hooks around the decoder and around the whole model: what a forward starts and leaves with.

Shape letters: B batch, S sequence, s = S / tp, H hidden, N heads, n = N / tp.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.model.head import CausalLMLoss, VocabParallelHead
from hf_sp.model.input_checks import check_forward
from hf_sp.model.lazy import LazyLogits
from hf_sp.plan.schema import Plan
from hf_sp.state import ParallelState
from hf_sp.torch_private import has_global_hooks


def _bind(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs by name, positional ones too."""
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


class DecoderBoundary:
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

    def install(self, module: nn.Module) -> None:
        """Register both hooks. The second also runs, to clean up, if the forward raises."""
        module.register_forward_pre_hook(self.start, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.finish, prepend=True, always_call=True)

    def start(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Note the whole sequence length; decode single tokens without sequence sharding."""
        state, inputs = self.state, _bind(module, args, kwargs)
        if not state.in_model:
            check_forward(self.model, state, inputs)
        tokens = inputs.get("inputs_embeds")
        tokens = inputs.get("input_ids") if tokens is None else tokens
        state.length = None if tokens is None else tokens.shape[1]
        self._batch = 0 if tokens is None else tokens.shape[0]
        # One token of a generation: all but one rank would get padding. Never in training, where a
        # checkpointed layer may run again after this forward is over.
        state.single_token = state.length == 1 and not torch.is_grad_enabled()
        as_dict = kwargs.get("return_dict")
        self._as_tuple = not (module.config.return_dict if as_dict is None else as_dict)
        return (args, {**kwargs, "return_dict": True}) if self._as_tuple else None

    def finish(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Gather the recorded hidden states (sequence) and attention weights (heads)."""
        state, length = self.state, self.state.length
        sharded = state.sharded
        routed = output.get("router_logits") if hasattr(output, "get") else None
        if routed is not None and length is not None:
            routed = self.leave_router_logits(routed, state, self._batch)
            output["router_logits"] = tuple(self._no_view(x) for x in routed)
        state.length, state.single_token = None, False
        state.delivered = (None, None)
        as_tuple, self._as_tuple = self._as_tuple, False
        if not hasattr(output, "get") or length is None:
            return None
        hidden = output.get("hidden_states")
        last = output.get("last_hidden_state")
        if hidden is not None and sharded:
            output["hidden_states"] = tuple(
                h
                if h is None or h is last
                else self._no_view(pairs.allgather_scatter(h, length, state.axis))
                for h in hidden
            )
        attentions = output.get("attentions")
        if attentions is not None:
            output["attentions"] = tuple(
                a if a is None else pairs.concat_slice(a, 1, (a.shape[1],) * state.tp, state.axis)
                for a in attentions
            )
        return output.to_tuple() if as_tuple else output

    def _no_view(self, x: Tensor) -> Tensor:
        # FSDP hangs hooks on what leaves the model. On a view an in-place operation would drop
        # them: it warns of each.
        return x.clone() if self.state.data > 1 else x


class ModelBoundary:
    """Hooks of the whole model: compare the inputs, decide what becomes of the lazy logits."""

    def __init__(self, state: ParallelState) -> None:
        self.state = state

    def install(self, module: nn.Module) -> None:
        """Register both hooks. The second also runs, to clean up, if the forward raises."""
        module.register_forward_pre_hook(self.start, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.finish, prepend=True, always_call=True)

    def start(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Compare the inputs over the ranks (first forwards); the head may be lazy from here on."""
        inputs = _bind(module, args, kwargs)
        check_forward(module, self.state, inputs)
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
        self.state.final_length = None
        if isinstance(output, tuple):
            # Logits that are not made leave their place to None: the others keep theirs.
            has_loss = len(output) > 1 and isinstance(output[1], LazyLogits)
            return tuple(self._resolve(x, module, has_loss) for x in output)
        if not hasattr(output, "get"):
            return None
        lazy = {name: x for name, x in output.items() if isinstance(x, LazyLogits)}
        has_loss = output.get("loss") is not None
        for name, x in lazy.items():
            output[name] = self._resolve(x, module, has_loss)
        return output if lazy else None

    def _resolve(self, x: Any, module: nn.Module, has_loss: bool) -> Any:
        if not isinstance(x, LazyLogits):
            return x
        if has_loss and not self._logits_wanted(module):
            return None
        return x.materialize()


def final_hidden(
    model: nn.Module, state: ParallelState, inputs: dict[str, Any], head_alone: bool
) -> Literal["gathered", "shard"]:
    """What the final norm returns in a forward of the whole model.

    Args:
        model: the whole model.
        state: its state.
        inputs: what its forward was called with.
        head_alone: whether nothing is asked for but what the head makes of it by chunks.
    """
    if not head_alone or _watched(model, state.plan):
        return "gathered"
    # A slice that keeps the last positions is of the whole sequence.
    keep = inputs.get("logits_to_keep")
    wanted = [inputs.get("output_hidden_states")]
    for module in (model, model.get_submodule(state.plan.decoder)):
        wanted.append(getattr(module.config, "output_hidden_states", None))
    # 0 asks for the first of them.
    recorded = any(w is not None and w is not False for w in wanted)
    return "gathered" if isinstance(keep, Tensor) or keep or recorded else "shard"


def _watched(model: nn.Module, plan: Plan) -> bool:
    """Whether code that we do not know would meet the final hidden states inside the forward.

    Someone's hooks on the final norm, on the decoder and what holds it, or on the head; a forward
    that was replaced, or that is not transformers' own.
    """
    if not type(model).forward.__module__.startswith("transformers."):
        return True
    if plan.head is None or has_global_hooks():
        return True
    if not isinstance(model.get_submodule(plan.head), VocabParallelHead):
        return True  # an adapter holds it
    decoder = plan.decoder.split(".")
    holders = [".".join(decoder[: i + 1]) for i in range(len(decoder))]
    for path in (plan.norm, plan.head, *holders):
        module = model.get_submodule(path)
        hooks = [module._forward_hooks, module._backward_hooks, module._backward_pre_hooks]
        if path == plan.head:
            hooks.append(module._forward_pre_hooks)
        if not all(_is_ours(hook) for group in hooks for hook in group.values()):
            return True
        replaced = module.__dict__.get("forward")
        if replaced is not None and not _is_ours(replaced):
            return True
    return False


def _is_ours(hook: Any) -> bool:
    owner = getattr(hook, "__self__", hook)
    module = getattr(owner, "__module__", None) or type(owner).__module__
    return module.partition(".")[0] == __name__.partition(".")[0]
