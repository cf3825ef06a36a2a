"""Rows, streams and collators of the integration tests. Knows nothing of models."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset, IterableDataset


class Rows(Dataset):
    """Rows of 3 to 9 tokens; the first labels are masked, as in completion-only training."""

    def __init__(self, n, seed=7, vocab=61):
        g = torch.Generator().manual_seed(seed)
        self.rows = []
        for i in range(n):
            ids = torch.randint(0, vocab, (3 + (5 * i) % 7,), generator=g)
            labels = ids.clone()
            labels[: i % 3] = -100
            self.rows.append({"input_ids": ids, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def even_rows(n, seed=7, masked=True):
    """Rows of six tokens: dispatched batches of different shapes cannot be concatenated."""
    rows = Rows(n, seed=seed)
    for row in rows.rows:
        if not masked:
            row["labels"] = row["input_ids"]
        for key in row:
            row[key] = row[key].repeat(3)[:6]
    return rows


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows.rows)


class SizedStream(Stream):
    def __len__(self):
        return len(self.rows)


def collate(rows):
    length = max(len(r["input_ids"]) for r in rows)

    def pad(x, value):
        return torch.cat([x, x.new_full((length - len(x),), value)])

    return {
        "input_ids": torch.stack([pad(r["input_ids"], 0) for r in rows]),
        "labels": torch.stack([pad(r["labels"], -100) for r in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(r["input_ids"]), 0) for r in rows]),
    }


def noisy_collate(rows):
    """A collator that draws at random, as masking and augmentation do."""
    batch = collate(rows)
    swap = torch.rand(batch["input_ids"].shape) < 0.3
    batch["input_ids"] = torch.where(
        swap, torch.full_like(batch["input_ids"], 5), batch["input_ids"]
    )
    return batch
