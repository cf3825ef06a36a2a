"""Vocab-parallel LM head, and the loss function that goes with it.

Shape letters: B batch, S sequence, s = S / tp, H hidden, V vocabulary, v local vocabulary rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.comm.collectives import padded
from hf_sp.errors import ShapeError
from hf_sp.kernels.cross_entropy_steps import LossTerms
from hf_sp.kernels.vocab import check_ids, vocab_range, vocab_sizes
from hf_sp.model.chunks import HeadSpec
from hf_sp.model.lazy import LazyLogits
from hf_sp.model.linear import ParallelLinear
from hf_sp.model.local import cast_for_autocast
from hf_sp.model.loss import linear_cross_entropy, scaled_loss
from hf_sp.state import ParallelState


class HeadRequest(NamedTuple):
    """The head and what it was called on, for who does without logits."""

    head: VocabParallelHead
    hidden: Tensor  # replicated [..., H], or a sequence shard [B, s, H]
    length: int | None  # whole sequence length of a shard, None if replicated


class VocabParallelHead(ParallelLinear):
    """An LM head whose vocabulary rows are split over tp, evenly or not.

    Inside the model's forward it returns ``LazyLogits``; called by anyone else, whole logits.

    Shapes:   x [B, S, H] replicated, or [B, s, H] where the final norm returned its sequence shard
              (``state.final_length``) -> [B, S, V] replicated
    Forward:  1 all-gather of the vocabulary, and 1 of a shard, when the logits are made
    Backward: 1 all-reduce, for a shard 1 reduce-scatter
    Saves:    x, the weight

    Raises:
        ShapeError: the hidden states were sliced between the final norm and the head.
    """

    state: ParallelState
    vocab: int

    @classmethod
    def convert_(cls, module: nn.Linear, state: ParallelState) -> None:
        """Make an ``nn.Linear`` one of these, in place."""
        module.__class__ = cls
        self = cast(VocabParallelHead, module)
        self.state, self.axis, self.vocab = state, state.axis, module.out_features
        start, stop = vocab_range(self.vocab, self.axis)
        self.out_features = stop - start

    def forward(self, x: Tensor) -> Tensor:
        """Whole logits, or a stand-in for them inside the model's own forward."""
        length = self.state.final_length
        shape = (*x.shape[:-1], self.vocab)
        if length is not None:
            rows = padded(length, self.state.tp) // self.state.tp
            if x.dim() != 3 or x.shape[1] != rows:
                raise ShapeError(
                    "something between the final norm and the LM head changed the sequence",
                    where=type(self).__name__,
                    got=f"hidden states {tuple(x.shape)}",
                    rule=f"for the loss alone it is [B, {rows}, H], a shard of {length} tokens",
                    remedy="parallelize(..., keep_logits=True)",
                )
            shape = (x.shape[0], length, self.vocab)
        request = HeadRequest(self, x, length)
        # Backward hooks wrap the output in a Function: it has to be a real tensor.
        if not self.state.in_model or self._backward_hooks or self._backward_pre_hooks:
            return self.logits(request)
        like = cast_for_autocast(x.new_empty(0), x)
        return LazyLogits(shape, like, lambda: self.logits(request), x, request)

    def logits(self, request: HeadRequest) -> Tensor:
        """The whole logits ``[..., V]``."""
        x = cast_for_autocast(request.hidden, request.hidden)
        if request.length is None:
            x = pairs.identity_allreduce(x, self.axis)
        else:
            x = pairs.allgather_reducescatter(x, request.length, self.axis)
        local_logits = F.linear(x, *self.local_parameters(x))
        sizes = vocab_sizes(self.vocab, self.axis)
        return pairs.concat_slice(local_logits, x.dim() - 1, sizes, self.axis)

    def spec(
        self, request: HeadRequest, ignore_index: int, scale: float, softcap: float | None
    ) -> HeadSpec:
        """How the request is computed with in chunks."""
        start, _ = vocab_range(self.vocab, self.axis)
        terms = LossTerms(self.vocab, start, ignore_index, softcap, scale, self.state.kernels)
        return HeadSpec(terms, self.axis, request.length is not None, self.state.loss_chunk)

    def extra_repr(self) -> str:
        """Local sizes, the place on the tp axis, the whole vocabulary."""
        return f"{super().extra_repr()}, vocab={self.vocab}"


class CausalLMLoss:
    """``ForCausalLMLoss`` of transformers, over lazy logits without making them.

    Same arguments and result: labels are shifted here unless ``shift_labels`` is given, the mean is
    over the labels that count, or the sum is divided by ``num_items_in_batch``. A model's scale and
    soft cap of its logits (Cohere, Granite, Gemma) are part of the loss. Logits that someone has
    touched otherwise, or another shape of labels, go to ``original``, the model's own loss.
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
        lazy = logits if isinstance(logits, LazyLogits) else None
        mapping = None if lazy is None or lazy.made else lazy.scale_and_softcap()
        if (
            lazy is None
            or mapping is None
            or targets is None
            or targets.dim() != 2
            or targets.shape != logits.shape[:-1]
        ):
            return self.original(
                logits=logits if lazy is None else lazy.materialize(),
                labels=labels,
                vocab_size=vocab_size,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        request: HeadRequest = lazy.request
        head, hidden = request.head, cast_for_autocast(request.hidden, request.hidden)
        if shift_labels is None:
            targets = F.pad(targets, (0, 1), value=ignore_index)[..., 1:]
        targets = targets.to(hidden.device)
        check_ids(targets, head.vocab, "labels", ignore_index)
        spec = head.spec(request, ignore_index, *mapping)
        total = linear_cross_entropy(hidden, *head.local_parameters(hidden), targets, spec)
        items = targets.ne(ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        return scaled_loss(total, items)
