"""Hooks around the decoder and around the whole model: what a forward starts and leaves with.

Shape letters: B batch, S sequence, s = S / tp, H hidden, N heads, n = N / tp.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hf_sp import collectives as comm
from hf_sp.layers.lazy import LazyLogits
from hf_sp.state import ParallelState
from hf_sp.surgery.guard import check_forward
from hf_sp.surgery.sparse import leave_router_logits


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

    def __init__(self, state: ParallelState, model: nn.Module) -> None:
        self.state, self.model = state, model
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
            output["router_logits"] = leave_router_logits(routed, state, self._batch)
        state.length, state.single_token = None, False
        as_tuple, self._as_tuple = self._as_tuple, False
        if not hasattr(output, "get") or length is None:
            return None
        hidden = output.get("hidden_states")
        if hidden is not None and sharded:
            last = output.get("last_hidden_state")
            output["hidden_states"] = tuple(
                h if h is None or h is last else comm.allgather_scatter(h, length, state.axis)
                for h in hidden
            )
        attentions = output.get("attentions")
        if attentions is not None:
            output["attentions"] = tuple(
                a if a is None else comm.concat_slice(a, 1, (a.shape[1],) * state.tp, state.axis)
                for a in attentions
            )
        return output.to_tuple() if as_tuple else output


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
        check_forward(module, self.state, _bind(module, args, kwargs))
        self.state.in_model = True

    def finish(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Make the logits that someone may read; drop those that a training step does not."""
        self.state.in_model = False
        if isinstance(output, tuple):
            # Logits that are not made leave their place to None: the others keep theirs.
            has_loss = len(output) > 1 and isinstance(output[1], LazyLogits)
            return tuple(self._resolve(x, module, has_loss) for x in output)
        logits = output.get("logits") if hasattr(output, "get") else None
        if isinstance(logits, LazyLogits):
            has_loss = output.get("loss") is not None
            output["logits"] = self._resolve(logits, module, has_loss)
            return output
        return None

    def _resolve(self, x: Any, module: nn.Module, has_loss: bool) -> Tensor | None:
        if not isinstance(x, LazyLogits):
            return x
        wanted = self.state.keep_logits if module.training else self.state.logits_wanted
        return x.materialize() if wanted or not has_loss else None
