"""Vocab-parallel LM head, and the loss function that goes with it.

Shape letters: B batch, S sequence, s = S / tp, H hidden, V vocabulary, v local vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.kernels.cross_entropy_steps import LossTerms
from hf_sp.kernels.vocab import check_ids, vocab_range, vocab_sizes
from hf_sp.model.lazy import LazyHidden, LazyLogits
from hf_sp.model.local import cast_for_autocast, local
from hf_sp.model.loss import LossSpec, linear_cross_entropy, scaled_loss
from hf_sp.state import ParallelState


@dataclass(frozen=True, slots=True)
class HeadRequest:
    """The head and what it was called on, for a loss that does without logits.

    Args:
        head: the head.
        hidden: whole hidden states, or a stand-in for them.
        shard: the sequence shard that they are gathered from, if they are.
    """

    head: VocabParallelHead
    hidden: Tensor
    shard: Tensor | None


class VocabParallelHead(nn.Linear):
    """An LM head whose vocabulary rows are split over tp, evenly or not.

    Inside the model's forward it returns ``LazyLogits``; called by anyone else, whole logits.

    Shapes:   x [B, S, H] replicated -> [B, S, V] replicated
    Forward:  1 all-gather (of the vocabulary), when the logits are made
    Backward: 1 reduce-scatter if x is the gathered final hidden state, else 1 all-reduce
    Saves:    x, the weight
    """

    state: ParallelState
    vocab: int

    @classmethod
    def take_over(cls, module: nn.Linear, state: ParallelState) -> None:
        """Make an ``nn.Linear`` one of these, in place."""
        module.__class__ = cls
        self = cast(VocabParallelHead, module)
        self.state, self.vocab = state, module.out_features
        start, stop = vocab_range(self.vocab, state.axis)
        self.out_features = stop - start

    def forward(self, x: Tensor) -> Tensor:
        """Whole logits, or a stand-in for them inside the model's own forward."""
        if isinstance(x, LazyHidden) and not x.made:
            shard: Tensor | None = x.shard
        else:
            # Touched: what it is now may be other than what was gathered.
            x = x.materialize() if isinstance(x, LazyHidden) else x
            shard = self.state.shard_of(x)
        request = HeadRequest(self, x, shard)
        # Backward hooks wrap the output in a Function: it has to be a real tensor.
        hooked = self._backward_hooks or self._backward_pre_hooks
        if not self.state.in_model or hooked:
            return self.logits(request)
        real = x if shard is None else shard
        like = cast_for_autocast(real.new_empty(0), real)
        shape = (*x.shape[:-1], self.vocab)
        return LazyLogits(shape, like, lambda: self.logits(request), real, request)

    def local_parameters(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Local weight rows and bias as this forward uses them, differentiable."""
        bias = None if self.bias is None else cast_for_autocast(local(self.bias), like)
        return cast_for_autocast(local(self.weight), like), bias

    def logits(self, request: HeadRequest) -> Tensor:
        """The whole logits ``[..., V]``."""
        axis = self.state.axis
        x = _whole(request.hidden)
        x = cast_for_autocast(x, x)
        if request.shard is not None:
            x = pairs.gathered_reducescatter(cast_for_autocast(request.shard, x), x, axis)
        else:
            x = pairs.identity_allreduce(x, axis)
        weight, bias = self.local_parameters(x)
        sizes = vocab_sizes(self.vocab, axis)
        return pairs.concat_slice(F.linear(x, weight, bias), x.dim() - 1, sizes, axis)

    def summed_loss(
        self,
        request: HeadRequest,
        labels_BS: Tensor,
        ignore_index: int,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> Tensor:
        """Sum over tokens of the cross entropy, without logits. See ``linear_cross_entropy``."""
        hidden, shard = request.hidden, request.shard
        full = None
        if not isinstance(hidden, LazyHidden) or hidden.made:
            full = _whole(hidden)
            full = cast_for_autocast(full, full)
        source = full if shard is None else cast_for_autocast(shard, shard)
        assert source is not None
        weight, bias = self.local_parameters(source)
        terms = LossTerms(
            vocab=self.vocab,
            start=vocab_range(self.vocab, self.state.axis)[0],
            ignore_index=ignore_index,
            softcap=softcap,
            scale=scale,
            triton=self.state.kernels,
        )
        chunk = self.state.loss_chunk
        spec = LossSpec(terms, self.state.axis, sharded=shard is not None, chunk=chunk)
        return linear_cross_entropy(source, full, weight, bias, labels_BS, spec)

    def extra_repr(self) -> str:
        """Local sizes and the place on the tp axis."""
        axis = self.state.axis
        return f"{super().extra_repr()}, vocab={self.vocab}, tp={axis.size}, tp_rank={axis.rank}"


def _whole(hidden: Tensor) -> Tensor:
    return hidden.materialize() if isinstance(hidden, LazyHidden) else hidden


class CausalLMLoss:
    """``ForCausalLMLoss`` of transformers, over lazy logits without making them.

    Same arguments and result: labels are shifted here unless ``shift_labels`` is given, the mean is
    over the labels that count, or the sum is divided by ``num_items_in_batch``. A model's scale and
    soft cap of its logits (Cohere, Granite, Gemma) are part of the loss. Logits that someone has
    touched otherwise, or another shape of labels, go to the model's own loss function.

    Args:
        original: the loss function that the model had.
    """

    def __init__(self, original: Callable[..., Tensor]) -> None:
        self.original = original

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss, a scalar equal on all ranks."""
        targets = labels if shift_labels is None else shift_labels
        mapped = logits.scale_and_softcap() if isinstance(logits, LazyLogits) else None
        if (
            not isinstance(logits, LazyLogits)
            or mapped is None
            or logits.made
            or targets is None
            or targets.shape != logits.shape[:-1]
            or targets.dim() != 2
        ):
            return self.original(
                logits=logits.materialize() if isinstance(logits, LazyLogits) else logits,
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        request: HeadRequest = logits.request
        if shift_labels is None:
            targets = F.pad(targets, (0, 1), value=ignore_index)[..., 1:]
        targets = targets.to(request.hidden.device)
        check_ids(targets, request.head.vocab, "labels", ignore_index)
        total = request.head.summed_loss(request, targets, ignore_index, *mapped)
        items: Any = num_items_in_batch
        if items is None:
            items = targets.ne(ignore_index).sum()
        elif isinstance(items, Tensor):
            items = items.to(total.device)
        # The denominator stays outside the summed loss: where no label counts, its gradients are
        # exact zeros and the loss is nan, as torch's; 0 / 0 inside would make every gradient nan.
        return scaled_loss(total, items)
