"""Are all ranks in the same call? A few numbers of each, told before what would hang or mix.

One form for all who ask, so that ranks which have parted meet here and say so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from hf_sp.errors import BatchMismatchError

CALLS = (
    "a training forward",
    "an evaluation forward",
    "a decoding forward",
    "generate",
    "Trainer between two batches",
)
_WORDS = 4
_MAGIC = 0x6866_7370_0000  # in the first word, so that another collective's data is known as such


def exchange(
    group: dist.ProcessGroup, device: torch.device | str, call: str, words: Sequence[float]
) -> list[list[float]]:
    """Every rank's words (up to 4, integers below 2^53); ``call`` is one of ``CALLS``.

    Collectives: 1 all-gather of 5 float64 a rank; the host waits for it.

    Raises:
        BatchMismatchError: on every rank, if they are in different calls.
    """
    told = [_MAGIC + CALLS.index(call), *words, *[0] * (_WORDS - len(words))]
    with torch.inference_mode(False), torch.no_grad():
        mine = torch.tensor(told, dtype=torch.float64, device=device)
        everyone = mine.new_empty(dist.get_world_size(group), len(told))
        dist.all_gather(list(everyone.unbind()), mine, group=group)
        rows = everyone.tolist()
    if any(row[0] != rows[0][0] for row in rows):
        names = {_MAGIC + i: name for i, name in enumerate(CALLS)}
        raise BatchMismatchError(
            "the ranks are in different calls",
            where="\n".join(f"rank {i}: {names.get(r[0], 'another')}" for i, r in enumerate(rows)),
            rule="every rank runs the same forwards, steps, evaluations and generations in turn",
            remedy="no forward, evaluation or generate inside an 'if rank == 0'; no step that one "
            "rank alone skips; the same accumulation on all ranks",
        )
    return [row[1:] for row in rows]
