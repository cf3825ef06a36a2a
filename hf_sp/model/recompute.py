"""How a tensor is made again in backward, instead of being saved.

A norm's output and the MLP's gated product are cheap functions of tensors that are saved anyway.
Whoever makes such a tensor leaves its recipe on it; whoever would save it for backward saves the
recipe's ingredients, which costs nothing, and makes it again when it is needed.

A recipe is an offer. It is void once someone has written into the tensor or an ingredient, and it
does not follow through an operation: what a hook of the user's has changed is saved like any other
tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_sp.torch_private import version

_RECIPE = "_hf_sp_recipe"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A tensor as a function of others.

    Args:
        make: the function; gives the same bits each time, and holds no tensor itself.
        ingredients: its arguments, with their gradient paths.
    """

    make: Callable[..., Tensor]
    ingredients: tuple[Tensor, ...]


def leave_recipe(x: Tensor, recipe: Recipe) -> None:
    """Offer ``recipe`` to whoever would save ``x``."""
    setattr(x, _RECIPE, (_versions(x, recipe), recipe))


def recipe_of(x: Tensor) -> Recipe | None:
    """The recipe of ``x``, if it has one that still holds."""
    written, recipe = getattr(x, _RECIPE, (None, None))
    return recipe if recipe is not None and written == _versions(x, recipe) else None


def _versions(x: Tensor, recipe: Recipe) -> tuple[int | None, ...]:
    return tuple(version(t) for t in (x, *recipe.ingredients))
