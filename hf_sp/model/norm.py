"""Stand-ins for the forwards of norms and gated MLPs whose maths is known.

They hang on the instance (``module.forward``): the module's class, name, hooks, parameters and
children stay what they were, so that ``isinstance``, adapters and checkpoints see no change. Where
the kernels have nothing to offer (torch.compile, somebody's hooks on the activation, an argument
they do not know), the class's own forward runs.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_sp.comm import collectives as comm
from hf_sp.comm.collectives import Axis
from hf_sp.kernels.norm import rms_norm, rms_norm_forward
from hf_sp.model.local import local
from hf_sp.model.mlp import gated_product
from hf_sp.model.parameters import LocalParameters
from hf_sp.model.recompute import Recipe, leave_recipe
from hf_sp.plan.known_forms import GatedForm, NormForm


def sum_over_ranks(dw_H: Tensor, axis: Axis) -> Tensor:
    """Sum the partial gradient of a norm's weight. One all-reduce."""
    return comm.all_reduce(dw_H, axis)


class NormForward:
    """``hf_sp.kernels.rms_norm`` in place of a norm's own forward.

    The float32 partial gradient of the weight is summed over tp before it is rounded.

    Shapes:   x [..., H] -> [..., H], the dtype that the module itself would return
    Forward:  no collective
    Backward: 1 all-reduce of the weight's gradient ``[H]`` in float32, where it is partial
    Saves:    x, one float32 a row, the weight

    Args:
        module: the norm.
        form: its maths.
        parameters: when its gradient is partial.
        recompute: offer the output's recipe to what follows.
        triton: run Triton kernels where they can.
    """

    def __init__(
        self,
        module: nn.Module,
        form: NormForm,
        parameters: LocalParameters,
        *,
        recompute: bool,
        triton: bool,
    ) -> None:
        self.module, self.form, self.parameters = module, form, parameters
        self.recompute, self.triton = recompute, triton
        # The attributes that hold eps: who sets another value later means it.
        self.settings = {k: v for k, v in vars(module).items() if isinstance(v, float)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The norm of one tensor."""
        form = self.form
        known = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        known = known and all(vars(self.module).get(k) == v for k, v in self.settings.items())
        known = known and (form.float64 or args[0].dtype != torch.float64)
        if not known or torch.compiler.is_compiling():
            with self.parameters.shown(self.module):
                return type(self.module).forward(self.module, *args, **kwargs)
        x, weight = args[0], local(cast(Tensor, self.module.weight))
        axis = self.parameters.state.axis
        reduce = functools.partial(sum_over_ranks, axis=axis) if self.parameters.summed() else None
        y = rms_norm(
            x,
            weight,
            form.eps,
            offset=form.offset,
            casting=form.casting,
            reduce=reduce,
            triton=self.triton,
        )
        # What a hook does to y by ``.data`` nobody can see: no offer to those who have one.
        if self.recompute and torch.is_grad_enabled() and not self.module._forward_hooks:
            leave_recipe(y, Recipe(self._again, (x, weight)))
        return y

    @property
    def _again(self) -> Any:
        # Of the form alone: a recipe lives in the autograd graph and must not hold the module.
        return functools.partial(_norm_again, form=self.form, triton=self.triton)


def _norm_again(x: Tensor, weight: Tensor, *, form: NormForm, triton: bool) -> Tensor:
    return rms_norm_forward(
        x, weight, form.eps, offset=form.offset, casting=form.casting, triton=triton
    )[0]


class GatedForward:
    """``down(silu(gate(x)) * up(x))`` in place of a gated MLP's own forward.

    Saves:    gate and up; the product too, unless ``recompute``

    Args:
        module: the MLP.
        form: the names of its three linears.
        recompute: offer the product's recipe to the down projection.
        triton: run Triton kernels where they can.
    """

    def __init__(
        self, module: nn.Module, form: GatedForm, *, recompute: bool, triton: bool
    ) -> None:
        self.module, self.form = module, form
        self.recompute, self.triton = recompute, triton
        linears = {form.gate, form.up, form.down}
        # The activation, and whatever else is not called here.
        self.others = {k: m for k, m in module._modules.items() if k not in linears}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The MLP of one tensor."""
        module, form = self.module, self.form
        plain = len(args) == 1 and not kwargs and not torch.compiler.is_compiling()
        if not plain or self._watched():
            return type(module).forward(module, *args, **kwargs)
        gate = getattr(module, form.gate)(args[0])
        up = getattr(module, form.up)(args[0])
        down = getattr(module, form.down)
        # A hook that runs behind it is shown the product, and may watch its gradient.
        shown = any(m._forward_hooks for m in down.modules())
        recompute = self.recompute and torch.is_grad_enabled() and not shown
        return down(gated_product(gate, up, triton=self.triton, recompute=recompute))

    def _watched(self) -> bool:
        """Whether someone has put another activation here, or hooks on it."""
        children = self.module._modules
        return any(
            children.get(name) is not child
            or (
                child is not None
                and bool(
                    child._forward_hooks
                    or child._forward_pre_hooks
                    or child._backward_hooks
                    or child._backward_pre_hooks
                )
            )
            for name, child in self.others.items()
        )
