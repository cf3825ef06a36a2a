"""Column and row parallel linears.

What a block's columns share, and who makes their weight gradients, is in ``model/columns.py``.

Shape letters: B batch, S sequence, H hidden, O out features of a whole linear, o = local out
features, f = local in features of a row linear.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from hf_sp.comm import pairs
from hf_sp.comm.collectives import Axis
from hf_sp.model.columns import entered_linear
from hf_sp.model.entered import entered
from hf_sp.model.local import cast_for_autocast, local
from hf_sp.model.mlp import GatedProduct, GatedRowLinear, RowLinear
from hf_sp.model.recompute import recipe_of
from hf_sp.torch_private import has_gradient_hooks


class ParallelLinear(nn.Linear):
    """Base of the parallel linears: an ``nn.Linear`` in place, with *local* in/out_features.

    Local, because adapters size their factors from them. Made by changing the class of the HF
    module, so that its name, hooks and identity stay.
    """

    axis: Axis
    # Rows of a weight that is stored whole (k/v heads fewer than tp): (first row, rows).
    rows: tuple[int, int] | None = None

    def local_parameters(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Local weight and bias as this forward uses them, differentiable."""
        bias = None if self.bias is None else self._local(self.bias, like)
        return self._local(self.weight, like), bias

    def _local(self, parameter: Tensor, like: Tensor) -> Tensor:
        tensor = local(parameter)
        if self.rows is not None:
            # Each rank uses its head's rows only: the whole gradient is the sum over ranks.
            tensor = pairs.identity_allreduce(tensor, self.axis).narrow(0, *self.rows)
        return cast_for_autocast(tensor, like)

    def extra_repr(self) -> str:
        """Local sizes and the place on the tp axis."""
        return f"{super().extra_repr()}, tp={self.axis.size}, tp_rank={self.axis.rank}"


class ColumnParallelLinear(ParallelLinear):
    """Linear whose output features are split over tp, or stored whole for k/v heads fewer than tp.

    Shapes:   x [B, S, H] -> [B, S, o], o = O / tp
    Forward:  no collective (the block's entry has gathered x)
    Backward: no collective; the input gradient is partial and leaves through the block's entry
    Saves:    the weight. On an input that did not come from the block's entry (changed on the way):
              an ordinary linear, which also saves its input.
    """

    @classmethod
    def take_over(cls, module: nn.Linear, axis: Axis, heads: int = 0) -> None:
        """Make an ``nn.Linear`` one of these, in place.

        Args:
            module: the linear.
            axis: the tp axis.
            heads: number of heads of a linear with fewer heads than ranks, else 0.
        """
        module.__class__ = cls
        self = cast(ColumnParallelLinear, module)
        self.axis = axis
        if heads:
            # Ranks r * tp / heads to (r + 1) * tp / heads share head r.
            width = module.out_features // heads
            self.rows = (axis.rank * heads // axis.size * width, width)
            self.out_features = width
        else:
            self.out_features //= axis.size

    def forward(self, x: Tensor) -> Tensor:
        """Apply the local rows of the weight."""
        found = entered(x, self)
        if found is None:
            weight, bias = self.local_parameters(x)
            return F.linear(cast_for_autocast(x, x), weight, bias)
        return entered_linear(x, *found)


class RowParallelLinear(ParallelLinear):
    """Linear whose input features are split over tp; returns a *partial* sum.

    The block's exit reduces it, so that what is added to it on the way (an adapter's own partial)
    shares the one collective. The bias is added by tp rank 0 only. Its gradient is computed by all
    ranks from the gathered output gradient, is whole on each and needs no sum.

    Shapes:   x [B, S, f] -> [B, S, H] partial, sequence-major inside under sp
    Forward:  no collective
    Backward: no collective; the output gradient is whole
    Saves:    the weight, and x or, where x is a gated product that is made again, gate and up
    """

    sp: bool

    @classmethod
    def take_over(cls, module: nn.Linear, axis: Axis, *, sp: bool) -> None:
        """Make an ``nn.Linear`` one of these, in place."""
        module.__class__ = cls
        self = cast(RowParallelLinear, module)
        self.axis, self.sp = axis, sp
        self.in_features //= axis.size

    def forward(self, x: Tensor) -> Tensor:
        """Apply the local columns of the weight."""
        weight, bias = self.local_parameters(x)
        x = cast_for_autocast(x, x)
        add_bias = self.axis.rank == 0
        recipe = recipe_of(x)
        # Whoever watches the product's gradient has to be shown it.
        if isinstance(recipe, GatedProduct) and not has_gradient_hooks(x):
            return GatedRowLinear.apply(
                *recipe.ingredients, x.detach(), weight, bias, add_bias, self.sp, recipe.triton
            )
        return RowLinear.apply(x, weight, bias, add_bias, self.sp)
