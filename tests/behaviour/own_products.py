"""Rank functions: a user's own products and modules beside the model, and around its head."""

from __future__ import annotations

from typing import Any

import torch
from harness import batches, tiny
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from behaviour.hostile import Batch, use
from hf_sp import parallelize


class Valued(nn.Module):
    """A value head beside a model that it holds."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm = lm
        self.value = nn.Linear(64, 1, dtype=torch.float64)
        nn.init.constant_(self.value.weight, 0.1)
        nn.init.zeros_(self.value.bias)

    def forward(self, **batch: Any) -> tuple[Any, Tensor]:
        output = self.lm(**batch, output_hidden_states=True)
        return output, self.value(output.hidden_states[-1]).squeeze(-1)


@use
def value_head(model: nn.Module, batch: Batch) -> Tensor:
    """On the last hidden states, beside a loss of the logits; its own gradient is compared."""
    valued = Valued(model)
    output, values = valued(**batch)
    (output.loss + values.square().mean()).backward()
    return valued.value.weight.grad


@use
def value_head_on_the_decoder(model: nn.Module, batch: Batch) -> Tensor:
    valued = Valued(model)
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
    valued.value(hidden).square().mean().backward()
    return valued.value.weight.grad


@use
def model_attribute(model: nn.Module, batch: Batch) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, **batch: Any) -> Any:
            return self.model(**batch)

    Wrapper()(**batch).loss.backward()


@use
def head_forward_around_its_own(model: nn.Module, batch: Batch) -> None:
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: 0.5 * forward(x)
    (model(**batch).loss + model(input_ids=batch["input_ids"]).logits.square().mean()).backward()


@use
def head_inside_of_another(model: nn.Module, batch: Batch) -> None:
    class Scaled(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.head(x)

    head, model.lm_head = model.lm_head, Scaled(model.lm_head)
    model(**batch).loss.backward()
    model.lm_head = head


@use
def product_with_the_whole_weight(model: nn.Module, batch: Batch) -> Tensor:
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
    weight = model.lm_head.weight
    logits = hidden @ (weight.full_tensor() if isinstance(weight, DTensor) else weight).T
    logits.square().mean().backward()
    return logits


@use
def head_called_by_hand(model: nn.Module, batch: Batch) -> Tensor:
    hidden = model.model(input_ids=batch["input_ids"]).last_hidden_state
    logits = model.get_output_embeddings()(hidden)
    logits.square().mean().backward()
    return logits


@use
def heads_own_product(model: nn.Module, batch: Batch) -> Tensor:
    """A forward of one's own over the head's weight, in a forward with labels and in one without.

    Not the loss: that of real logits is transformers' own, in float32.
    """
    head = model.lm_head
    head.forward = lambda x: 0.5 * (x @ head.weight.T) + x @ head.weight[:1].t()
    labelled = model(**batch).logits
    (labelled.square().mean() + model(input_ids=batch["input_ids"]).logits.mean()).backward()
    return labelled


def product_outside() -> str:
    """A product with the weight outside of its module: raised by torch, not wrong."""
    model = parallelize(tiny.build("llama"))
    hidden = model.model(input_ids=batches.plain(2, 17)["input_ids"]).last_hidden_state
    try:
        hidden @ model.lm_head.weight.T
    except RuntimeError as error:
        return str(error)
    return ""
