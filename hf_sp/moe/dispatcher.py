"""Which rows of tokens go to which experts, and on which rank these are.

Shape letters: T tokens of this rank, k experts a token, E experts, e = E / ep local experts,
R rows (token, choice) of this rank's tokens, Q rows that arrive here, H hidden.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.collectives import Axis
from hf_sp.moe.grouped import Groups
from hf_sp.torch_private import is_fake


@dataclass(slots=True)
class Dispatcher:
    """Who sends how many rows (token, choice) to whom, for one block and forward.

    ``local``: each rank has a part of every expert, or some experts and all tokens; nothing
    travels. ``all_to_all``: each rank has whole experts and its own tokens; a token is sent once to
    each of its k experts, and the results come back. No capacity: nothing is dropped, and ranks
    exchange as many rows as there are.

    Args:
        shape: ``(T, k)``.
        rows: ``[R]`` places in the flattened ``[T * k]`` routing tensors, sorted by expert
            and so by destination; without those of experts that are nowhere here.
        groups: where each local expert's rows end.
        axis: the ranks that rows travel among; None if they stay.
        places: ``[Q]`` int32 order by local expert of the rows that arrive, which come rank by
            rank.
        send: rows that go to each rank.
        receive: rows that come from each rank.
    """

    shape: torch.Size
    rows: Tensor
    groups: Groups
    axis: Axis | None = None
    places: Tensor | None = None
    send: list[int] = dataclasses.field(default_factory=list)
    receive: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def local(cls, index_Tk: Tensor, count: int, first: int | None = None) -> Dispatcher:
        """Rows stay here: those of all ``count`` experts, or of the ``count`` from ``first`` on.

        With ``first``, 1 synchronisation.
        """
        rows, ends = _sorted(index_Tk, first or 0, count)
        groups = Groups(ends)
        rows = rows if first is None else rows[: groups.on_host()[-1]]
        return cls(index_Tk.shape, rows, groups)

    @classmethod
    def all_to_all(cls, index_Tk: Tensor, local: int, axis: Axis) -> Dispatcher:
        """Agree on the numbers: 1 all-to-all of E integers, 1 synchronisation.

        Args:
            index_Tk: the experts of this rank's tokens; E for a token that stays at home.
            local: e, number of experts on each rank.
            axis: the ranks that the experts are split over, in rank order.
        """
        rows, ends = _sorted(index_Tk, 0, local * axis.size)
        mine = torch.diff(ends.long(), prepend=ends.new_zeros(1))
        ones = [local] * axis.size
        theirs = comm.all_to_all(mine, ones, ones, axis)
        # The estimate's tensors have no values: an even router then.
        even = [[rows.shape[0] // len(mine)] * len(mine)] * 2
        sent, got = even if is_fake(index_Tk) else torch.stack([mine, theirs]).tolist()
        starts = range(0, len(sent), local)
        send, receive = ([sum(n[i : i + local]) for i in starts] for n in (sent, got))
        experts = torch.arange(local, device=theirs.device).repeat(axis.size)
        experts = experts.repeat_interleave(theirs, output_size=sum(receive))
        ends = theirs.view(axis.size, local).sum(0).cumsum(0).to(torch.int32)
        host = list(itertools.accumulate(sum(got[i::local]) for i in range(local)))
        places = torch.argsort(experts, stable=True).int()
        rows = rows[: sum(send)]
        return cls(index_Tk.shape, rows, Groups(ends, host), axis, places, send, receive)

    def permute(self, x_TH: Tensor) -> Tensor:
        """Each row's token, ``[R, H]``."""
        return x_TH.index_select(0, self.rows // self.shape[1])

    def spread(self, y: Tensor) -> Tensor:
        """``[T, k, ...]`` of what belongs to rows, ``[R, ...]``; zero where a row was left out."""
        full = y.new_empty if y.shape[0] == self.shape.numel() else y.new_zeros
        y = full(self.shape.numel(), *y.shape[1:]).index_copy_(0, self.rows, y)
        return y.view(*self.shape, *y.shape[1:])

    def unpermute(self, y_RH: Tensor) -> Tensor:
        """``[T, H]``: each token's sum over its rows.

        In the order of the top_k, without atomics: the same bits each time.
        """
        return self.spread(y_RH).sum(1)

    def launch_dispatch(self, rows: Tensor) -> Tensor:
        """Send this rank's sorted rows to their experts."""
        if self.axis is None:
            return rows
        return comm.launch_all_to_all(rows, self.receive, self.send, self.axis)

    def land_dispatch(self, launched: Tensor) -> Tensor:
        """The rows of this rank's experts, sorted by them."""
        if self.places is None:
            return launched
        return comm.wait(launched).index_select(0, self.places)

    def launch_combine(self, rows: Tensor) -> Tensor:
        """The way back; wait for it before reading."""
        if self.axis is None or self.places is None:
            return rows
        back = torch.empty_like(rows).index_copy_(0, self.places.long(), rows)
        return comm.launch_all_to_all(back, self.send, self.receive, self.axis)

    def land_combine(self, launched: Tensor) -> Tensor:
        """This rank's rows, in their sorted order."""
        return launched if self.axis is None else comm.wait(launched)

    def with_tensors(self, rows: Tensor, ends: Tensor, places: Tensor | None) -> Dispatcher:
        """The same numbers with these tensors, which autograd saves: rows as int32."""
        groups = Groups(ends, self.groups.host)
        return dataclasses.replace(self, rows=rows.long(), groups=groups, places=places)


def _sorted(index_Tk: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Places of the rows of ``count`` experts from ``first`` on, then of others; where each ends.

    Nothing is read back from the device.
    """
    ids = index_Tk.reshape(-1) - first
    ids = torch.where((ids < 0) | (ids >= count), count, ids)
    ids, rows = torch.sort(ids, stable=True)
    experts = torch.arange(count, device=ids.device, dtype=ids.dtype)
    return rows, torch.searchsorted(ids, experts, right=True).to(torch.int32)
