"""What queries see, known without a mask of the whole sequence: of some queries, which keys.

transformers asks the function of an attention implementation for a mask. Ours (``describe``) reads
the function of positions that it is handed, by the names that transformers has for such functions
(5.17 to 5.24; private, held by tests/unit/test_masks.py), and answers with an interval of keys for
each query. What is no interval is evaluated tile by tile.

Shape letters: B batch, S sequence, n queries, m keys of a tile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from hf_sp.errors import ConfigError
from hf_sp.torch_private import is_fake


class Seen(NamedTuple):
    """The keys that some queries see: ``first`` to ``last`` some of them, the inner ones all."""

    first: int
    last: int
    inner_first: int
    inner_last: int
    diagonal: bool  # each sees itself and nothing behind it


class Mask:
    """Who sees whom. This one is told nothing: all have to be asked."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}
        """What others have worked out from this mask, which lives for a forward."""

    def seen(self, query: int, n: int) -> Seen | None:
        """What n queries from that one on see; None if only ``tile`` knows."""
        return None

    def meets(self, query: int, n: int, key: int, m: int) -> bool:
        """Whether some of these queries may see some of these keys."""
        if not n or not m:
            return False
        found = self.seen(query, n)
        return found is None or (found.first < key + m and found.last >= key)

    def tile(self, query: int, n: int, key: int, m: int, like: Tensor) -> Tensor:
        """What to add to the scores, ``[B or 1, a or 1, n, m]`` of the dtype of ``like``."""
        allowed = self.allowed(query, n, key, m, like.device)
        zeros = torch.zeros(allowed.shape, dtype=like.dtype, device=like.device)
        return zeros.masked_fill_(~allowed, float("-inf"))

    def allowed(self, query: int, n: int, key: int, m: int, device: torch.device) -> Tensor:
        """Whether they do, as transformers has it, ``[B or 1, 1, n, m]``."""
        raise NotImplementedError


class Band(Mask):
    """A query sees so many keys before and behind it: causal, sliding, full."""

    def __init__(self, S: int, before: int, after: int) -> None:
        super().__init__()
        self.S, self.before, self.after = S, before, after

    def seen(self, query: int, n: int) -> Seen:  # noqa: D102
        first, last = query - self.before, query + self.after
        ends = max(first, 0), min(last + n - 1, self.S - 1)
        return Seen(*ends, max(first + n - 1, 0), min(last, self.S - 1), self.after == 0)

    def allowed(self, query: int, n: int, key: int, m: int, device: torch.device) -> Tensor:  # noqa: D102
        ahead = torch.arange(key, key + m, device=device) - torch.arange(
            query, query + n, device=device
        ).unsqueeze(1)
        return ((ahead >= -self.before) & (ahead <= self.after))[None, None]


class Intervals(Mask):
    """Query q of row b sees the keys ``first[b, q]`` to ``last[b, q]``: int, on the CPU."""

    def __init__(self, first: Tensor, last: Tensor, device: torch.device) -> None:
        super().__init__()
        S, nothing = first.shape[1], last < first
        # So that who sees nothing does not widen what others do.
        self.first, self.last = first.masked_fill(nothing, S), last.masked_fill(nothing, -1)
        self.there = [x.to(device, non_blocking=True) for x in (self.first, self.last)]

    def seen(self, query: int, n: int) -> Seen:  # noqa: D102
        found = self.known.get((query, n))
        if found is None:
            first, last = (x[:, query : query + n] for x in (self.first, self.last))
            own = torch.arange(query, query + n)
            ends = first.min(), last.max(), first.max(), last.min(), last.eq(own).all()
            found = self.known[query, n] = Seen(*(x.item() for x in ends))  # type: ignore[arg-type]
        return found

    def allowed(self, query: int, n: int, key: int, m: int, device: torch.device) -> Tensor:  # noqa: D102
        first, last = (x[:, query : query + n, None] for x in self.there)
        keys = torch.arange(key, key + m, device=device)
        return ((keys >= first) & (keys <= last))[:, None]


class Evaluated(Mask):
    """A function of positions that is asked for each tile, by transformers' own."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given

    def allowed(self, query: int, n: int, key: int, m: int, device: torch.device) -> Tensor:  # noqa: D102
        place = {"q_length": n, "q_offset": query, "kv_length": m, "kv_offset": key}
        how: dict[str, Any] = {**self.given, **place, "allow_is_causal_skip": False}
        found = masking_utils.sdpa_mask(**how)
        assert found is not None
        return found


class Given(Mask):
    """A mask ``[B or 1, a or 1, S, S]`` that somebody has made, true where seen, or added."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def tile(self, query: int, n: int, key: int, m: int, like: Tensor) -> Tensor:  # noqa: D102
        if self.mask.dtype == torch.bool:
            return super().tile(query, n, key, m, like)
        return self.allowed(query, n, key, m, like.device).to(like.dtype)

    def allowed(self, query: int, n: int, key: int, m: int, device: torch.device) -> Tensor:  # noqa: D102
        return self.mask[..., query : query + n, key : key + m]


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Mask:
    """Of transformers' mask interface: intervals if it can be, for a sequence without a cache.

    Reads a padding mask, or which tokens are one document's, on the host: one transfer for each
    kind of mask of a forward.

    Raises:
        ConfigError: keys that are no queries.
    """
    S = q_length
    others = kv_length != S or q_offset or kv_offset
    if others or (attention_mask is not None and attention_mask.shape[-1] != S):
        raise ConfigError(
            "ring attention was asked for keys that are no queries",
            got=f"{S} queries, {kv_length} keys",
            rule="the ranks of a ring have the same tokens as queries and as keys",
            legal="cp_mode='ulysses', or a forward under torch.no_grad() with a cache",
        )
    found = _read(mask_function, S)
    padding = None if attention_mask is None or is_fake(attention_mask) else attention_mask.cpu()
    ends = None if padding is None else _ends(padding)
    holes = padding is not None and ends is None
    if found is None or (found.moved and found.documents is None) or holes:
        given = {"batch_size": batch_size, "mask_function": mask_function, "use_vmap": use_vmap}
        return Evaluated({**given, "attention_mask": attention_mask, "device": device})
    # Without values, as in an estimate, there is one document.
    documents = None if found.documents is None or is_fake(found.documents) else found.documents
    if documents is None and (padding is None or padding.all()):
        return Band(S, found.before, found.after)
    own = torch.arange(S)
    first, last = own - found.before, own + found.after
    if documents is not None:
        begin, end = _documents(documents.cpu())
        first, last = torch.maximum(first, begin), torch.minimum(last, end)
    if ends is not None:
        first, last = torch.maximum(first, ends[0]), torch.minimum(last, ends[1])
    whole = (batch_size, S)
    return Intervals(first.clamp(min=0).expand(whole), last.clamp(max=S - 1).expand(whole), device)


class _Read(NamedTuple):
    before: int
    after: int
    documents: Tensor | None = None  # [B, S], a number for each
    moved: bool = False  # in positions of documents, which are as far from each other


def _read(function: Any, S: int) -> _Read | None:
    """What a function of transformers' says; None for what is not known."""
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    held = inspect.getclosurevars(function).nonlocals
    match function.__qualname__.removesuffix(".<locals>.inner_mask"):
        case "causal_mask_function":
            return _Read(S, 0)
        case "bidirectional_mask_function":
            return _Read(S, S)
        case "sliding_window_overlay":
            return _Read(held["sliding_window"] - 1, S)
        case "sliding_window_bidirectional_overlay":
            return _Read(held["sliding_window"], held["sliding_window"])
        case "packed_sequence_mask_function":
            return _Read(S, S, held["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            inner = _read(held["mask_function"], S)
            return None if inner is None else inner._replace(moved=True)
        case "and_masks.<locals>.and_mask":
            return _joined([_read(one, S) for one in held["mask_functions"]])
    return None


def _joined(all_of: list[_Read | None]) -> _Read | None:
    found = [one for one in all_of if one is not None]
    documents = [one.documents for one in found if one.documents is not None]
    if len(found) < len(all_of) or len(documents) > 1:
        return None
    before, after = (min(one[i] for one in found) for i in (0, 1))
    moved = any(one.moved for one in found)
    return _Read(before, after, documents[0] if documents else None, moved)


def _ends(real: Tensor) -> tuple[Tensor, Tensor] | None:
    """First and last real token of each row, ``[B, 1]``; None where padding is amid."""
    count, S = real.sum(1, keepdim=True), real.shape[1]
    first = real.int().argmax(1, keepdim=True)
    last = S - 1 - real.int().flip(1).argmax(1, keepdim=True)
    last = torch.where(count > 0, last, first - 1)
    return (first, last) if bool((last - first + 1 == count).all()) else None


def _documents(number: Tensor) -> tuple[Tensor, Tensor]:
    """First and last token of each token's document, ``[B, S]``."""
    S, own = number.shape[1], torch.arange(number.shape[1])
    new = number[:, 1:] != number[:, :-1]
    first = torch.nn.functional.pad(new, (1, 0), value=True)
    last = torch.nn.functional.pad(new, (0, 1), value=True)
    begin = own.where(first, 0).cummax(1).values
    end = own.where(last, S - 1).flip(1).cummin(1).values.flip(1)
    return begin, end
