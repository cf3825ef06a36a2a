"""How the modules of a block know the tensor that the block's entry has gathered.

The tensor carries its entry as an attribute, which no operation copies: what a hook or an adapter
has changed on the way is an ordinary tensor again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from hf_sp.torch_private import has_gradient_hooks, version

if TYPE_CHECKING:
    from hf_sp.model.columns import Entry

_ENTRY = "_hf_sp_entry"


class Member(Protocol):
    """Has a weight whose gradient the block's entry makes."""

    def local_parameters(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Local weight and bias as this forward uses them, differentiable."""


def mark_entered(x: Tensor, entry: Entry) -> None:
    """Let the block's modules know that ``x`` is what the entry has gathered."""
    setattr(x, _ENTRY, (entry, version(x)))


def entered(x: Tensor, module: object) -> tuple[Entry, int] | None:
    """The entry that has gathered ``x``, and the module's slot there."""
    return entered_slot(x, id(module))


def entered_slot(x: Tensor, key: int) -> tuple[Entry, int] | None:
    """The entry that has gathered ``x``, and the slot of what it knows by ``key``.

    None also where someone has written into x, which the entry would not gather again, or watches
    its gradient, which would go by: x is an ordinary tensor then.
    """
    entry: Entry | None
    entry, written = getattr(x, _ENTRY, (None, None))
    slot = None if entry is None else entry.slots.get(key)
    if entry is None or slot is None or written != version(x) or has_gradient_hooks(x):
        return None
    return entry, slot
