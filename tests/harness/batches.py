"""Batches: each is a dict of keyword arguments for `model(**batch)`, made without the global RNG.

Owns: shapes, masks, labels. Must not know: models beyond vocabulary and hidden size, hf_sp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

IGNORE = -100
Batch = dict[str, torch.Tensor | bool]


def tokens(batch: int, length: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """[batch, length] ids over the whole vocabulary; its first and last row amid every sequence.

    Amid, because a token at either end may be padding, or have no successor and so no gradient: a
    fault in the first or last row (a padding row, an uneven shard) must show.
    """
    generator = torch.Generator().manual_seed(7919 * seed + 31 * batch + length)
    ids = torch.randint(vocab, (batch, length), generator=generator)
    ids[:, length // 2] = 0
    if length > 2:
        ids[:, length // 2 - 1] = vocab - 1
    return ids


def plain(batch: int = 2, length: int = 16, vocab: int = 96, seed: int = 0) -> Batch:
    """Ids, and the same ids as labels."""
    ids = tokens(batch, length, vocab, seed)
    return {"input_ids": ids, "labels": ids.clone()}


def left_padded(batch: int = 2, length: int = 16, vocab: int = 96, seed: int = 0) -> Batch:
    """Row i has i + 1 pads before it (at most length - 1).

    Positions count from the first real token.
    """
    return _padded(batch, length, vocab, seed, left=True)


def right_padded(batch: int = 2, length: int = 16, vocab: int = 96, seed: int = 0) -> Batch:
    """Row i has i + 1 pads after it (at most length - 1)."""
    return _padded(batch, length, vocab, seed, left=False)


def _padded(batch: int, length: int, vocab: int, seed: int, left: bool) -> Batch:
    out = plain(batch, length, vocab, seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        pads = min(row + 1, length - 1)
        if pads:
            mask[row, slice(0, pads) if left else slice(length - pads, length)] = 0
    out["attention_mask"] = mask
    out["labels"] = out["labels"].masked_fill(mask == 0, IGNORE)
    if left:
        out["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return out


def left_padded_without_positions(
    batch: int = 2, length: int = 16, vocab: int = 96, seed: int = 0
) -> Batch:
    """As `left_padded`, but HF counts positions from the first pad: what a plain collator sends."""
    out = left_padded(batch, length, vocab, seed)
    del out["position_ids"]
    return out


def packed(
    documents: tuple[int, ...] = (5, 1, 7, 3), vocab: int = 96, seed: int = 0, batch: int = 1
) -> Batch:
    """Documents in a row, told apart by position_ids alone (DataCollatorWithFlattening).

    HF looks for jumps in position_ids only where attention_mask is None and there is no cache; a
    model called with its default `use_cache=True` makes one, in training too, and then documents
    see each other. Trainer turns it off. A document's first token is no target: its predecessor
    belongs to another document.
    """
    out = {**plain(batch, sum(documents), vocab, seed), "use_cache": False}
    positions = torch.cat([torch.arange(n) for n in documents])
    out["position_ids"] = positions.expand(batch, -1).clone()
    out["labels"] = out["labels"].masked_fill(out["position_ids"] == 0, IGNORE)
    return out


def odd_positions(batch: int = 2, length: int = 16, vocab: int = 96, seed: int = 0) -> Batch:
    """Positions that start elsewhere than at 0, another place in each row."""
    out = plain(batch, length, vocab, seed)
    out["position_ids"] = torch.arange(length) + 3 + 2 * torch.arange(batch)[:, None]
    return out


def ignored_runs(batch: int = 2, length: int = 16, vocab: int = 96, seed: int = 0) -> Batch:
    """Prompts of different lengths without labels; the second half is without labels in row 0."""
    out = plain(batch, length, vocab, seed)
    out["labels"][0, length // 2 :] = IGNORE
    for row in range(batch):
        out["labels"][row, : min(2 * row + 2, length // 2)] = IGNORE
    return out


def only_labels_of_shard(
    shard: int, shards: int, batch: int = 2, length: int = 16, vocab: int = 96
) -> Batch:
    """All labels belong to tokens *predicted from* one sequence shard.

    Every other rank's share of the loss is empty.
    """
    out = plain(batch, length, vocab)
    size = -(-length // shards)
    keep = torch.zeros(length, dtype=torch.bool)
    keep[shard * size + 1 : (shard + 1) * size + 1] = True
    out["labels"] = out["labels"].masked_fill(~keep, IGNORE)
    return out


def labels_at_shard_boundaries(
    shards: int, batch: int = 2, length: int = 16, vocab: int = 96
) -> Batch:
    """The only targets are first tokens of a shard.

    Each is predicted by the last token of the shard before.
    """
    out = plain(batch, length, vocab)
    size = -(-length // shards)
    keep = torch.zeros(length, dtype=torch.bool)
    keep[size::size] = True
    out["labels"] = out["labels"].masked_fill(~keep, IGNORE)
    return out


def all_ignored_but_last(batch: int = 2, length: int = 17, vocab: int = 96) -> Batch:
    """The last token is the only target: a length rounded down loses the whole loss."""
    out = plain(batch, length, vocab)
    out["labels"][:, :-1] = IGNORE
    return out


def mask_4d(
    batch: int = 2, length: int = 16, vocab: int = 96, dtype: torch.dtype = torch.float64
) -> Batch:
    """An additive mask made by the caller.

    Causal, and every token blind to token 1 (but for itself).
    """
    out = plain(batch, length, vocab)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[2:, 1] = False
    additive = torch.zeros(length, length, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    out["attention_mask"] = additive.expand(batch, 1, -1, -1).clone()
    return out


def mask_of_heads(batch: int = 2, length: int = 16, vocab: int = 96, heads: int = 8) -> Batch:
    """As ``mask_4d``, with another mask for each head: head h is blind to token h."""
    out = mask_4d(batch, length, vocab)
    mask = out["attention_mask"].expand(batch, heads, -1, -1).clone()
    for head in range(heads):
        mask[:, head, head + 1 :, head] = torch.finfo(mask.dtype).min
    return {**out, "attention_mask": mask}


def count_targets(batch: Batch) -> int:
    """Targets that count after the shift, as Trainer's num_items_in_batch does."""
    if "shift_labels" in batch:
        return int((batch["shift_labels"] != IGNORE).sum())
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def with_num_items(batch: Batch, items: int | None = None) -> Batch:
    """Divide by a given number of items, as Trainer does, and not by the targets seen.

    The default is twice the number of this batch's targets.
    """
    return {
        **batch,
        "num_items_in_batch": torch.tensor(2 * count_targets(batch) if items is None else items),
    }


def with_shift_labels(batch: Batch) -> Batch:
    """Labels shifted by the caller; `labels` stays, since HF asks for it, but must not be read.

    It is poisoned.
    """
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:].contiguous()
    return {**batch, "shift_labels": shifted, "labels": torch.zeros_like(batch["labels"])}


def with_inputs_embeds(batch: Batch, hidden: int = 64, dtype: torch.dtype = torch.float64) -> Batch:
    """Embeddings made by the caller instead of ids, as a leaf that wants a gradient."""
    generator = torch.Generator().manual_seed(5)
    shape = (*batch["input_ids"].shape, hidden)
    embeds = 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    return {**rest, "inputs_embeds": embeds.requires_grad_()}


def micro_batches(count: int, vocab: int, seed: int) -> list[Batch]:
    """The micro-batches of one step, ragged in batch, length, padding and number of targets.

    With one: left-padded, 17 tokens. With more, as Trainer: all divided by the targets of the whole
    step.
    """
    kinds: list[Callable[[], Batch]] = [
        lambda: left_padded(2, 17, vocab, seed),
        lambda: packed((5, 1, 7, 3), vocab, seed),
        lambda: ignored_runs(3, 7, vocab, seed),
    ]
    made = [kinds[index % len(kinds)]() for index in range(count)]
    if count == 1:
        return made
    items = sum(count_targets(one) for one in made)
    return [with_num_items(one, items) for one in made]
