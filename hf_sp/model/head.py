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
from hf_sp.comm.parts import Parts, gather_take, sum_times
from hf_sp.errors import ShapeError
from hf_sp.kernels.cross_entropy_steps import LossTerms
from hf_sp.kernels.vocab import check_ids, vocab_range, vocab_sizes
from hf_sp.model.chunks import HeadSpec
from hf_sp.model.lazy import LazyLogits, LazyWeight
from hf_sp.model.linear import ParallelLinear
from hf_sp.model.local import cast_for_autocast, local
from hf_sp.model.loss import linear_cross_entropy, scaled_loss
from hf_sp.state import ParallelState


class HeadRequest(NamedTuple):
    """The head and what it was called on, for who does without logits."""

    head: VocabParallelHead
    hidden: Tensor  # replicated [..., H], or a sequence shard [B, s, H]
    length: int | None  # of the sequence, or its part, that a shard is of; None if replicated
    whole: int = 0  # and of all of it
    parts: Parts | None = None  # how that is cut over context parallel ranks
    sharded: bool = False  # over tp too


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
        self.register_forward_pre_hook(show_whole_weight)
        self.register_forward_hook(hide_whole_weight, always_call=True)

    def forward(self, x: Tensor) -> Tensor:
        """Whole logits, or a stand-in for them inside the model's own forward."""
        state = self.state
        length = state.final_length
        shape, request = (*x.shape[:-1], self.vocab), HeadRequest(self, x, length)
        if length is not None:
            rows = padded(length, state.tp) // state.tp if state.sp else length
            if x.dim() != 3 or x.shape[1] != rows:
                raise ShapeError(
                    "something between the final norm and the LM head changed the sequence",
                    where=type(self).__name__,
                    got=f"hidden states {tuple(x.shape)}",
                    rule=f"for the loss alone it is [B, {rows}, H], a shard of {length} tokens",
                    remedy="parallelize(..., keep_logits=True)",
                )
            whole = length if state.cut is None else state.whole_length
            request = HeadRequest(self, x, length, whole, state.cut, state.sp)
            shape = (x.shape[0], whole, self.vocab)
        # Backward hooks wrap the output in a Function: it has to be a real tensor.
        if not self.state.in_model or self._backward_hooks or self._backward_pre_hooks:
            return self.logits(request)
        like = cast_for_autocast(x.new_empty(0), x)
        return LazyLogits(shape, like, lambda: self.logits(request), x, request)

    def logits(self, request: HeadRequest) -> Tensor:
        """The whole logits ``[..., V]``."""
        x = cast_for_autocast(request.hidden, request.hidden)
        if request.sharded:
            x = pairs.allgather_reducescatter(x, request.length, self.axis)
        else:
            x = pairs.identity_allreduce(x, self.axis)
        if request.parts is not None:
            x = gather_take(x, request.whole, request.parts)
        local_logits = F.linear(x, *self.local_parameters(x))
        sizes = vocab_sizes(self.vocab, self.axis)
        return pairs.concat_slice(local_logits, x.dim() - 1, sizes, self.axis)

    def spec(
        self, request: HeadRequest, ignore_index: int, scale: float, softcap: float | None
    ) -> HeadSpec:
        """How the request is computed with in chunks."""
        start, _ = vocab_range(self.vocab, self.axis)
        terms = LossTerms(self.vocab, start, ignore_index, softcap, scale, self.state.kernels)
        return HeadSpec(terms, self.axis, request.sharded, self.state.loss_chunk)

    def extra_repr(self) -> str:
        """Local sizes, the place on the tp axis, the whole vocabulary."""
        return f"{super().extra_repr()}, vocab={self.vocab}"


def show_whole_weight(head: VocabParallelHead, args: Any) -> None:
    """A forward that somebody has put in place of the head's own computes with the whole weight.

    As on hidden states that are equal on all ranks: each computes it all.
    """
    if "forward" not in head.__dict__:
        return

    def whole() -> Tensor:
        rows = local(cast(Tensor, head._parameters["weight"]))
        return pairs.concat_slice(rows, 0, vocab_sizes(head.vocab, head.axis), head.axis)

    head.__dict__["weight"] = LazyWeight(whole)


def hide_whole_weight(head: VocabParallelHead, args: Any, output: Any) -> None:
    """Give the registered parameter back."""
    head.__dict__.pop("weight", None)


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
        items = targets.ne(ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        spec, parts = head.spec(request, ignore_index, *mapping), request.parts
        if parts is not None:
            targets = parts.take(targets, 1, ignore_index)
        total = linear_cross_entropy(hidden, *head.local_parameters(hidden), targets, spec)
        if parts is not None:
            total = sum_times(total, parts)
        return scaled_loss(total, items)
