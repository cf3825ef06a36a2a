"""The entry of a mixture-of-experts block, which works on flattened tokens.

HF's sparse blocks flatten ``[B, S, H]`` to ``[T, H]``, batch-major, and hand that to router,
experts and shared expert. The entry is the TP block's (``model/columns.py``) in that order.

Shape letters: B batch, S sequence, s = S / tp, H hidden, T = B * S (B * s where tokens travel).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.model.columns import Entry, open_entry
from hf_sp.model.entered import Member, mark_entered
from hf_sp.model.recompute import Recipe, leave_recipe, recipe_of
from hf_sp.moe.beside import Crossing, LazyShared
from hf_sp.torch_private import graph_task, has_gradient_hooks, same_storage, version


@dataclass(eq=False)
class FlatEntry(Entry):
    """Entry of a block whose modules see ``[T, H]``.

    Args:
        own: the block stays on this rank's tokens: nothing is gathered, and what its modules send
            back is the whole input gradient already.
        copy: the block writes into its input (jitter noise), which must not be its caller's.

    Where tokens travel, what may run meanwhile is known here: ``waiting`` in forward, ``beside`` in
    backward; ``grad`` is whether autograd was on at the block's entry.
    """

    own: bool = False
    copy: bool = False
    shape: tuple[int, ...] = ()
    full: Tensor | None = field(default=None, repr=False)
    made: tuple[Any, int | None] = (None, None)
    recipe: Recipe | None = field(default=None, repr=False)
    waiting: LazyShared | None = field(default=None, repr=False)
    beside: Crossing | None = field(default=None, repr=False)
    arriving: list[Callable[[], Tensor]] = field(default_factory=list, repr=False)
    grad: bool = field(default_factory=torch.is_grad_enabled)

    def begin(self) -> None:
        """Forget what an earlier backward has left, one that ended before the entry."""
        if graph_task() != self.task:
            arriving, self.arriving = self.arriving, []
            for land in arriving:
                land()  # whatever was launched is waited for
        super().begin()

    def buffer_order(self, x: Tensor) -> Tensor:
        """Batch-major everywhere inside; the collectives' order is made at the border."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Contiguous ``[B, S, H]``: HF flattens it by ``view``. A copy only where B > 1."""
        if self.sharded and not self.own:
            x = comm.gather_sequence(x, self.length, self.axis)
            return x.clone(memory_format=torch.contiguous_format) if self.copy else x.contiguous()
        if self.copy:
            return x.clone(memory_format=torch.contiguous_format)
        return x.view_as(x) if x.is_contiguous() else x.contiguous()

    def receive(self, slot: int, dy: Tensor, weight: Tensor, keep: bool) -> None:
        """As ``Entry.receive``, for dy ``[T, o]`` or ``[B, S, o]``."""
        self.begin()
        dy_To = dy.reshape(-1, dy.shape[-1])
        if keep:
            self.dy.setdefault(slot, []).append(dy_To)
        if self.dx is None:
            self.dx = dy_To @ weight
        else:
            self.dx.addmm_(dy_To, weight)

    def receive_rows(self, dx_TH: Tensor) -> None:
        """A part of the block's input gradient, ready-made."""
        self.begin()
        self.dx = dx_TH if self.dx is None else self.dx.add_(dx_TH)

    def receive_later(self, land: Callable[[], Tensor]) -> None:
        """A part of the block's input gradient that is on its way; ``land`` waits for it."""
        self.begin()
        self.arriving.append(land)

    def wait_later(self, output: LazyShared) -> None:
        """A block's output that may be made while the rows of the experts travel."""
        self.waiting, self.beside = output, output.crossing

    def run_beside(self) -> None:
        """The experts' rows have been launched: run what has waited for that."""
        if self.waiting is not None:
            self.waiting.begin()

    def launch_beside(self) -> None:
        """The same in backward, where what runs beside is the next node's."""
        if self.beside is not None:
            self.beside.launch()

    def take_input_gradient(self, extra_BSH: Tensor | None) -> Tensor | None:
        """The block's summed input gradient, in the order of its collective; forgets it."""
        dx, self.dx = self.dx, None
        arriving, self.arriving = self.arriving, []
        for land in arriving:
            rows = land()
            dx = rows if dx is None else dx.add_(rows)
        if extra_BSH is not None:
            extra = extra_BSH.reshape(-1, extra_BSH.shape[-1])
            dx = extra if dx is None else dx.add_(extra)
        if dx is None:
            return None
        dx = dx.view(*self.shape[:-1], -1)
        if self.own or not self.sharded:
            return dx
        return comm.pad_sequence(dx.transpose(0, 1), self.axis)

    def launch(self, partial: Tensor) -> Tensor:
        """Start the reduction, if there is one."""
        return partial if self.own else super().launch(partial)

    def landed(self, launched: Tensor) -> Tensor:
        """The input gradient as ``[B, s, H]``."""
        if self.own:
            return launched
        dx = comm.wait(launched)
        return dx.transpose(0, 1) if self.sharded else dx

    def tokens(self, x: Tensor) -> Tensor:
        """``[T, H]``, gathered again."""
        if self.sharded and not self.own:
            x = comm.gather_sequence(x, self.length, self.axis)
        return x.reshape(-1, x.shape[-1])

    def close(self) -> None:
        """The block has run."""
        super().close()
        if self.waiting is not None:
            # It may never run now, or much later; nobody may read what it has made.
            self.waiting.entry.settle()
            self.waiting.crossing.settle()
        self.full = self.recipe = self.waiting = None

    def mark(self, x: Any) -> None:
        """Mark ``x`` if it is what was gathered, flattened: HF's ``view`` makes a new tensor."""
        full = self.full
        if full is None or not isinstance(x, Tensor) or x is full:
            return
        if not _flattened(x, full, *self.made):
            return
        mark_entered(x, self)
        if self.recipe is not None:
            leave_recipe(x, self.recipe)


def enter_sparse(entry: FlatEntry, x: Tensor, members: Sequence[tuple[object, Member]]) -> Tensor:
    """Gather the input of a sparse block for its router, experts and shared expert.

    Shapes:   x [B, s, H] -> [B, S_padded, H] contiguous; [B, s, H] if ``entry.own``
    Forward:  as ``enter_block``; nothing if ``entry.own``
    Backward: as ``enter_block``; nothing if ``entry.own``
    Saves:    as ``enter_block``
    """
    recipe = recipe_of(x)
    if entry.own and recipe is not None and not entry.copy:
        # On its own tokens: who would save them can make them again, as this entry does.
        entry.recipe = Recipe(_Shaped(recipe.make, _flat), recipe.ingredients)
    full = open_entry(entry, x, members)
    entry.shape, entry.full = tuple(full.shape), full
    # As it was made: a write into it gives it another node, and its views the same version.
    entry.made = full.grad_fn, version(full)
    return full


def unsqueezed(recipe: Recipe) -> Recipe:
    """The recipe of ``x[None]``."""
    return Recipe(_Shaped(recipe.make, torch.Tensor.unsqueeze), recipe.ingredients)


@dataclass(frozen=True, slots=True)
class _Shaped:
    """A recipe's tensor in another shape: plain data, so that a recipe holds no module."""

    make: Callable[..., Tensor]
    shape: Callable[[Tensor, int], Tensor]

    def __call__(self, *ingredients: Tensor) -> Tensor:
        return self.shape(self.make(*ingredients), 0)


def _flat(x: Tensor, dim: int) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _flattened(x: Tensor, full: Tensor, made_by: Any, written: int | None) -> bool:
    """Whether x is ``full`` as ``[T, H]``, unwritten, and sends its gradient there."""
    same = (
        x.numel() == full.numel()
        and x.shape[-1] == full.shape[-1]
        and x.is_contiguous()
        and same_storage(x, full)
        and x.storage_offset() == full.storage_offset()
        and version(x) == written
        and not has_gradient_hooks(full)
    )
    if not same or x.requires_grad != full.requires_grad:
        return False
    node = x.grad_fn
    while node is not None and node is not made_by:
        if not node.name().startswith(("View", "UnsafeView", "Alias")):
            return False
        node = node.next_functions[0][0]
    return node is made_by
