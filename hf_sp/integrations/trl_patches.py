"""TRL's trainers and a parallelized model.

TRL 1.16 scores tokens with a fused head of its own that reads ``lm_head.weight``: with DTensors it
would gather the whole head in every step. Here the same outputs come from the vocab-parallel head.

Versions named here: trl 1.16.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

from hf_sp.errors import ConfigError
from hf_sp.kernels.vocab import check_ids, vocab_range
from hf_sp.model.head import VocabParallelHead
from hf_sp.model.local import cast_for_autocast
from hf_sp.model.logprobs import FIELDS, Spec, TokenStatistics, token_statistics
from hf_sp.patching import Patch, Patches
from hf_sp.state import ParallelState, parallel_state

SUPPORTED = ("SFTTrainer", "DPOTrainer")
"""Trainers of TRL that are tested with parallelized models."""

_IGNORE = -100


def install(trainer: Any) -> None:
    """Make TRL's trainers right for parallelized models, if ``trainer`` is one of them.

    Called while a Trainer is made: TRL is not imported for those who do not use it.

    Raises:
        ConfigError: another trainer of TRL, or arguments that need whole logits twice.
    """
    names = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
    if not names or parallel_state(trainer.model) is None:
        return
    # The nearest one: TRL derives others from these two, a user's own class may too.
    if names[0] not in SUPPORTED:
        raise ConfigError(
            f"{names[0]} is not supported for a parallelized model",
            where=f"trl.{names[0]}",
            rule="each trainer of TRL scores tokens in its own way; these are tested",
            legal=", ".join(SUPPORTED),
        )
    _check_arguments(trainer.args)
    patches().apply()


def _check_arguments(args: Any) -> None:
    if getattr(args, "precompute_ref_log_probs", False):
        raise ConfigError(
            "precompute_ref_log_probs=True is not supported for a parallelized model",
            where=type(args).__name__,
            rule="TRL names its cache by a hash over the whole weights of each rank",
            legal="precompute_ref_log_probs=False",
        )
    if getattr(args, "activation_offloading", False):
        raise ConfigError(
            "activation_offloading=True is not supported for a parallelized model",
            where=type(args).__name__,
            rule="it has not been tested with sequence shards",
            legal="activation_offloading=False, with gradient_checkpointing=True",
        )


def _is_ours(thing: Any) -> bool:
    model = thing if isinstance(thing, nn.Module) else thing.model
    return parallel_state(model) is not None


@functools.cache
def patches() -> Patches:
    """The patches, made once TRL is there."""
    from trl.trainer import dpo_trainer, sft_trainer

    table = Patches(_is_ours)
    for module in (sft_trainer, dpo_trainer):
        table.on(module, "add_fused_lm_head")(add_parallel_head)
    for trainer in (sft_trainer.SFTTrainer, dpo_trainer.DPOTrainer):
        table.on(trainer, "compute_loss")(count_tokens_once)
    return table


def add_parallel_head(
    original: Patch,
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """TRL's fused head computes on whole weights: the head would be gathered in every step.

    ``model(..., fused_lm_head=True)`` gives the same ``FusedCausalLMOutput`` here, from each rank's
    own rows. Without it, the forward is the model's own.
    """
    plain = model.forward
    scale, cap = _logit_transform(model.config.get_text_config())

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        if getattr(self.config.get_text_config(), "output_router_logits", False):
            raise ConfigError(
                "router losses are not supported for a parallelized model",
                where="config.output_router_logits",
                legal="False",
            )
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        state = parallel_state(self)
        assert state is not None
        targets = shifted
        if targets is None:
            # The last position has no next token.
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORE)
        found = _score(
            _head_of(self),
            hidden,
            targets,
            state,
            scale,
            cap,
            temperature,
            cast_lm_head_to_fp32,
            tuple(f for f in FIELDS if f in outputs),
        )
        return _output(found, targets, items, drop_last=shifted is None)

    model.forward = types.MethodType(forward, model)


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """What the model does to its logits: a factor and a soft cap, by the names TRL reads."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if value is not None:
            return float(value), getattr(config, "final_logit_softcapping", None)
    scaling = getattr(config, "logits_scaling", None)
    scale = 1.0
    if scaling is not None:
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    return float(scale), getattr(config, "final_logit_softcapping", None)


def _head_of(model: Any) -> VocabParallelHead:
    """The head that is in use: itself, or the trained copy of it."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if copies is not None:
        active = not head.disable_adapters and head.active_adapters
        head = copies[head.active_adapters[0]] if active else head.original_module
    if not isinstance(head, VocabParallelHead):
        raise ConfigError(
            "TRL's fused head needs the plain LM head",
            where="model.get_output_embeddings()",
            got=type(head).__name__,
            rule="log-probabilities are computed from its weight",
            remedy="leave lm_head out of target_modules",
        )
    return head


def _score(
    head: VocabParallelHead,
    hidden: Tensor,
    targets: Tensor,
    state: ParallelState,
    scale: float,
    cap: float | None,
    temperature: float,
    in_float: bool,
    fields: tuple[str, ...],
) -> TokenStatistics:
    targets = targets.to(hidden.device)
    check_ids(targets, head.vocab, "labels", _IGNORE)
    shard = state.shard_of(hidden)
    source = hidden if shard is None else shard
    if in_float:
        x, source = hidden.float(), source.float()
        weight, bias = head.local_parameters(x)
        weight, bias = weight.float(), None if bias is None else bias.float()
    else:
        x, source = cast_for_autocast(hidden, hidden), cast_for_autocast(source, hidden)
        weight, bias = head.local_parameters(x)
    spec = Spec(
        axis=state.axis,
        sharded=shard is not None,
        start=vocab_range(head.vocab, state.axis)[0],
        vocab=head.vocab,
        chunk=state.loss_chunk,
        scale=scale,
        cap=cap,
        temperature=temperature,
        fields=fields,
    )
    return token_statistics(source, x, weight, bias, targets, spec, _IGNORE)


def _output(found: TokenStatistics, targets: Tensor, items: Any, drop_last: bool) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    mask = targets != _IGNORE
    if drop_last:
        mask = mask[:, :-1]
        found = TokenStatistics(*(None if x is None else x[:, :-1] for x in found))  # type: ignore[arg-type]
    count = mask.sum().clamp(min=1) if items is None else items
    return FusedCausalLMOutput(
        loss=-found.log_probs.sum() / count,
        label_mask=mask,
        **found._asdict(),
    )


def count_tokens_once(original: Patch, self: Any, *args: Any, **kwargs: Any) -> Any:
    """TRL divides its token count by tp, as it has summed it over the ranks.

    For a parallelized model ``gather_for_metrics`` returns each rank's own, which are all.
    """
    self._tp_size = 1
    return original(self, *args, **kwargs)
