"""How other packages' methods are wrapped: once, only for our models, without losing the original.

A patch is a function ``(original, self, ...)`` in a ``Patches`` table. Its docstring says which
defect of which version it covers. Must not know what is patched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_ORIGINAL = "__hf_sp_original__"

Patch = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Name:
    """One name that a patch stands on."""

    path: str  # module:attribute
    signature: str | None = None  # as the patch passes parameters on; None for what is not called
    lines: tuple[str, ...] = ()  # that its source has as long as the patch is needed and right


class Patches:
    """A table of method patches; for instances that are not ``active`` the original runs."""

    def __init__(self, active: Callable[[Any], bool]) -> None:
        self.active = active
        self.entries: list[tuple[type | ModuleType, str, Patch]] = []

    def on(self, owner: type | ModuleType, name: str) -> Callable[[Patch], Patch]:
        """Decorator: ``owner.name`` becomes this function, with the original as first argument.

        The owner is a class, whose method or property it is, or a module whose function takes the
        instance first, by position or by its name.
        """

        def register(patch: Patch) -> Patch:
            self.entries.append((owner, name, patch))
            return patch

        return register

    def apply(self) -> None:
        """Put every patch in place. Can be called again."""
        for owner, name, patch in self.entries:
            current = inspect.getattr_static(owner, name)
            read: Any = current.fget if isinstance(current, property) else current
            if not hasattr(read, _ORIGINAL):
                wrapped = self._wrapped(read, patch)
                setattr(owner, name, property(wrapped) if read is not current else wrapped)

    def _wrapped(self, original: Callable[..., Any], patch: Patch) -> Callable[..., Any]:
        first = next(iter(inspect.signature(original).parameters))

        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            if not self.active(args[0] if args else kwargs.get(first)):
                return original(*args, **kwargs)
            if not args:
                args = (kwargs.pop(first),)
            return patch(original, *args, **kwargs)

        setattr(method, _ORIGINAL, original)
        return method
