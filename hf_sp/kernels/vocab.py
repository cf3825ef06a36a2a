"""How a vocabulary lies on the ranks, for sizes that tp does not divide too."""

from __future__ import annotations

from torch import Tensor

from hf_sp.comm.collectives import Axis
from hf_sp.comm.shard import shard_range
from hf_sp.errors import ShapeError
from hf_sp.torch_private import device_assert


def vocab_range(vocab: int, axis: Axis) -> tuple[int, int]:
    """First row and end of this rank's range."""
    return shard_range(vocab, axis.size, axis.rank)


def vocab_sizes(vocab: int, axis: Axis) -> tuple[int, ...]:
    """Rows on each rank."""
    ranges = (shard_range(vocab, axis.size, rank) for rank in range(axis.size))
    return tuple(stop - start for start, stop in ranges)


def check_ids(ids: Tensor, vocab: int, name: str, ignore_index: int | None) -> None:
    """Refuse ids outside the vocabulary: no rank owns them, and they would silently count as zero.

    On a GPU the check is a device assert, as in ``torch.nn.functional``: no synchronisation.

    Raises:
        ShapeError: on CPU, for an id outside [0, vocab) that is not ``ignore_index``.
    """
    # Fake, functional and local tensors hold no values to look at.
    if type(ids) is not Tensor or ids.device.type == "meta" or ids.numel() == 0:
        return
    bad = (ids < 0) | (ids >= vocab)
    if ignore_index is not None:
        bad &= ids != ignore_index
    if ids.device.type != "cpu":
        device_assert(~bad.any(), f"{name} holds an id outside the vocabulary")
        return
    if bool(bad.any()):
        raise ShapeError(
            f"{name} holds an id outside the vocabulary",
            got=str(int(ids[bad][0])),
            rule=f"0 <= id < {vocab}"
            + ("" if ignore_index is None else f", or {ignore_index} to ignore the token"),
        )
