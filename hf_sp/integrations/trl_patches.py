"""TRL's trainers and a parallelized model.

TRL 1.16 scores tokens with a fused head of its own that reads ``lm_head.weight``: with DTensors it
would gather the whole head in every step. Here the same outputs come from the vocab-parallel head.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor, nn

from hf_sp.comm.parts import gather_take
from hf_sp.errors import ConfigError
from hf_sp.kernels.vocab import check_ids
from hf_sp.model.forward import final_hidden
from hf_sp.model.head import HeadRequest
from hf_sp.model.lazy import LazyLogits
from hf_sp.model.local import cast_for_autocast
from hf_sp.model.logprobs import FIELDS, TokenStatistics, token_statistics
from hf_sp.patching import Patch, Patches
from hf_sp.state import parallel_state

SUPPORTED = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer")
"""Trainers of TRL that are tested with parallelized models."""

_REFUSED = {
    "precompute_ref_log_probs": "TRL names its cache by a hash over each rank's whole weights",
    "activation_offloading": "it has not been tested with sequence shards; "
    "gradient_checkpointing=True has",
}
_IGNORE = -100


def install(trainer: Any) -> None:
    """Make TRL's trainers right for parallelized models, if ``trainer`` is one of them.

    Called while a Trainer of ours is made: TRL is not imported for those who do not use it.

    Raises:
        ConfigError: another trainer of TRL, or arguments that need whole logits twice.
    """
    names = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
    if not names:
        return
    # The nearest one: TRL derives others from these, a user's own class may too.
    if names[0] not in SUPPORTED:
        raise ConfigError(
            f"{names[0]} is not supported for a parallelized model",
            where=f"trl.{names[0]}",
            rule="each trainer of TRL scores tokens in its own way; these are tested",
            legal=", ".join(SUPPORTED),
        )
    for argument, rule in _REFUSED.items():
        if getattr(trainer.args, argument, False):
            raise ConfigError(
                f"{argument}=True is not supported for a parallelized model",
                where=type(trainer.args).__name__,
                rule=rule,
                legal=f"{argument}=False",
            )
    patches().apply()


@functools.cache
def patches() -> Patches:
    """The patches, made once TRL is there."""
    from trl.trainer import dpo_trainer, kto_trainer, sft_trainer

    table = Patches(lambda model: parallel_state(model) is not None)
    for module in (sft_trainer, dpo_trainer, kto_trainer):  # reward models have no LM head
        table.on(module, "add_fused_lm_head")(add_parallel_head)
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

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain(*args, **kwargs)
        labels, shifted = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        state = parallel_state(self)
        assert state is not None
        state.final_hidden = final_hidden(self, state, kwargs, head_alone=True)
        made = plain(*args, **{**kwargs, "use_cache": False, "return_dict": True})
        targets = shifted
        if targets is None:
            # The last position has no next token.
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORE)
        fields = tuple(f for f in FIELDS if f in outputs)
        found = _score(made.logits, targets, temperature, cast_lm_head_to_fp32, fields)
        output = _output(found, targets, items, drop_last=shifted is None)
        if made.get("aux_loss") is not None:
            _add_auxiliary_loss(output, made.aux_loss, self.config.get_text_config())
        return output

    model.forward = types.MethodType(forward, model)


def _add_auxiliary_loss(output: Any, aux_loss: Tensor, config: Any) -> None:
    """Of a mixture of experts that is asked for its router's logits."""
    output["aux_loss"] = aux_loss
    output["loss"] = output.loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss


def _score(
    logits: Tensor, targets: Tensor, temperature: float, in_float: bool, fields: tuple[str, ...]
) -> TokenStatistics:
    """Statistics of the tokens from logits that have not been made."""
    known = logits.scale_and_softcap() if isinstance(logits, LazyLogits) else None
    if not isinstance(logits, LazyLogits) or logits.made or known is None:
        raise ConfigError(
            "TRL's fused head needs the plain LM head",
            where="model.get_output_embeddings()",
            rule="log-probabilities are computed from its weight, and from a factor and a soft cap "
            "of the logits",
            remedy="leave lm_head out of target_modules, and backward hooks off it",
        )
    request: HeadRequest = logits.request
    head, hidden = request.head, request.hidden
    targets = targets.to(hidden.device)
    check_ids(targets, head.vocab, "labels", _IGNORE)
    hidden = hidden.float() if in_float else cast_for_autocast(hidden, hidden)
    weight, bias = head.local_parameters(hidden)
    if in_float:
        weight, bias = weight.float(), None if bias is None else bias.float()
    scale, cap = known
    # cap * tanh(scale * x / cap) / temperature is of the same form.
    cap = None if cap is None else cap / temperature
    spec, parts = head.spec(request, _IGNORE, scale / temperature, cap), request.parts
    if parts is None:
        return token_statistics(hidden, weight, bias, targets, spec, fields)
    own = token_statistics(hidden, weight, bias, parts.take(targets, 1, _IGNORE), spec, fields)
    whole = (x if x is None else gather_take(x, request.whole, parts) for x in own)
    return TokenStatistics(*whole)  # type: ignore[arg-type]


def _output(found: TokenStatistics, targets: Tensor, items: Any, drop_last: bool) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    mask = targets != _IGNORE
    if drop_last:
        mask = mask[:, :-1]
        found = TokenStatistics(*(None if x is None else x[:, :-1] for x in found))  # type: ignore[arg-type]
    count = mask.sum().clamp(min=1) if items is None else items
    loss = -found.log_probs.sum() / count
    return FusedCausalLMOutput(loss=loss, label_mask=mask, **found._asdict())
