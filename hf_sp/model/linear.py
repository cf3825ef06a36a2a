"""Column and row parallel linears. What a block's columns share is in ``columns``.

Shape letters: B batch, S sequence, H hidden, O out features of a whole linear, o = local out
features, f = local in features of a row linear.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.comm.autograd import Node, once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.model.local import autocast_dtype, cast_for_autocast, check_gathered, local
from hf_sp.model.ports import BlockInput, column_linear
from hf_sp.model.recompute import recompute_of
from hf_sp.torch_private import has_gradient_hooks, pack, unpack


class ParallelLinear(nn.Linear):
    """Base of the parallel linears: an ``nn.Linear`` in place, with *local* in/out_features.

    Local, because adapters size their factors from them. Made by changing the class of the HF
    module, so that its name, hooks and identity stay.
    """

    axis: Axis
    block: BlockInput
    # Rows of a weight that is stored whole (k/v heads fewer than tp): stretches (first row, rows).
    rows: tuple[tuple[int, int], ...] | None = None
    # How many features, or heads, each of several linears in one has; each is split by itself.
    segments: tuple[int, ...] = ()

    def local_parameters(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Local weight and bias as this forward uses them, differentiable."""
        bias = None if self.bias is None else self._local(self.bias, like)
        return self._local(cast(Tensor, self._parameters["weight"]), like), bias

    def node_parameters(self, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for an autograd node, which takes DTensors as they are."""
        weight = self.weight
        direct = self.rows is None and isinstance(weight, DTensor) and autocast_dtype(like) is None
        if not direct or torch.compiler.is_compiling():
            return self.local_parameters(like)
        check_gathered(weight)  # type: ignore[arg-type]
        return weight, self.bias

    def _local(self, parameter: Tensor, like: Tensor) -> Tensor:
        tensor = local(parameter)
        if self.rows is not None:
            # Each rank uses its head's rows only: the whole gradient is the sum over ranks.
            tensor = self.own_rows(pairs.identity_allreduce(tensor, self.axis))
        return cast_for_autocast(tensor, like)

    def own_rows(self, whole: Tensor) -> Tensor:
        """Of something by output row, the rows that this rank computes, if all are stored."""
        if self.rows is None:
            return whole
        parts = [whole.narrow(0, *stretch) for stretch in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def extra_repr(self) -> str:
        """Local sizes and the place on the tp axis."""
        return f"{super().extra_repr()}, tp={self.axis.size}, tp_rank={self.axis.rank}"


class ColumnParallelLinear(ParallelLinear):
    """Linear whose output features are split over tp, or stored whole for k/v heads fewer than tp.

    Shapes:   x [B, S, H] -> [B, S, o], o = O / tp
    Forward:  no collective (the block's entry has gathered x)
    Backward: no collective; the input gradient is partial and leaves through the block's entry
    Saves:    nothing: the block's entry has the weight and the shard of x. On an input that is not
              the gathered one (changed on the way): an ordinary linear, which saves both.
    """

    @classmethod
    def convert_(
        cls,
        module: nn.Linear,
        axis: Axis,
        block: BlockInput,
        rows: tuple[tuple[int, int], ...] | None = None,
        *,
        segments: tuple[int, ...] = (),
    ) -> None:
        """Make an ``nn.Linear`` one of these, in place.

        ``rows``: stretches of the weight's rows, which is stored whole then.
        """
        module.__class__ = cls
        self = cast(ColumnParallelLinear, module)
        self.axis, self.block = axis, block
        self.rows, self.segments = rows, segments
        if rows is None:
            self.out_features //= axis.size
        else:
            self.out_features = sum(count for _, count in rows)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the local rows of the weight."""
        gathered = self.block.gathered or self.block.before(x)
        port = None if gathered is None else gathered.port(self, x)
        if gathered is None or port is None:
            weight, bias = self.local_parameters(x)
            return F.linear(cast_for_autocast(x, x), weight, bias)
        return column_linear(x, port, gathered.batch_major)


class RowParallelLinear(ParallelLinear):
    """Linear whose input features are split over tp; returns a *partial* sum.

    The block's exit reduces it, so that what is added to it on the way (an adapter's own partial)
    shares the one collective. The bias is added by tp rank 0 only. Its gradient is computed by all
    ranks from the gathered output gradient, is whole on each and needs no sum.

    Shapes:   x [B, S, f] -> [B, S, H] partial, sequence-major inside under sp
    Forward, backward: no collective; the output gradient is whole
    Saves:    the weight, and x or what x is computed again from
    """

    sp: bool

    @classmethod
    def convert_(cls, module: nn.Linear, axis: Axis, block: BlockInput, *, sp: bool) -> None:
        """Make an ``nn.Linear`` one of these, in place."""
        module.__class__ = cls
        self = cast(RowParallelLinear, module)
        self.axis, self.block, self.sp = axis, block, sp
        self.in_features //= axis.size

    def forward(self, x: Tensor) -> Tensor:
        """Apply the local columns of the weight."""
        weight, bias = self.node_parameters(x)
        x = cast_for_autocast(x, x)
        add = self.axis.rank == 0
        # With rows of zeros up to a multiple of tp, which the reduce-scatter wants.
        sharded = self.sp and x.dim() == 3
        height = comm.padded(x.shape[1], self.axis.size) if sharded else 0
        recompute = recompute_of(x)
        # Whoever watches the product's gradient has to be shown it.
        if recompute is not None and recompute.row_linear and not has_gradient_hooks(x):
            y = recompute.row_linear(*recompute.inputs, x.detach(), weight, bias, add, height)
        else:
            y = RowLinear.apply(x, weight, bias, add, height)
        if not sharded:
            return y
        if height == x.shape[1]:
            return y.transpose(0, 1)
        z = y[: x.shape[1]].transpose(0, 1)
        if self.block.gathered is not None:
            self.block.partial = z, y
        return z


class RowLinear(Node):
    """``x W^T``, laid out for the reduce-scatter that follows.

    Shapes:   x [..., f], weight [H, f] -> [..., H] partial; with a ``height``: [height, B, H],
              sequence-major, with zeros from row S on
    Forward, backward: no collective
    Saves:    x if the weight needs a gradient, the weight
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add_bias: bool, height: int
    ) -> Tensor:
        """Apply the weight."""
        y, weight = row_output(ctx, x, weight, bias, add_bias, height)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients of x, weight and bias."""
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias = ctx.needs_input_grad[:3]
        dx = row_input_gradient(ctx, grads[0], weight) if needs_x else None
        return dx, *row_parameter_gradients(ctx, grads[0], x, needs_bias), None, None


def row_output(
    ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, add_bias: bool, height: int
) -> tuple[Tensor, Tensor]:
    """A row linear's output, and its local weight."""
    ctx.height, ctx.length = height, x.shape[1] if height else None
    (weight, bias), ctx.specs = unpack((weight, bias))
    bias = bias if add_bias else None
    # The reduce-scatter wants [S, B, H]: permute the 1/tp-size input, not the full-size output.
    x = x.transpose(0, 1) if height else x
    if height in (0, x.shape[0]):
        return F.linear(x, weight, bias), weight
    S, B = x.shape[:2]
    y = x.new_empty(height, B, weight.shape[0])
    y[S:].zero_()
    rows, flat = y[:S].view(S * B, -1), x.reshape(S * B, -1)
    if bias is None:
        torch.mm(flat, weight.t(), out=rows)
    else:
        torch.addmm(bias, flat, weight.t(), out=rows)
    return y, weight


def row_input_gradient(ctx: Any, dy: Tensor, weight: Tensor) -> Tensor:
    """The gradient of what ``row_output`` was given, batch-major."""
    dy = dy[: ctx.length]
    dx = (dy.reshape(-1, dy.shape[-1]) @ weight).view(*dy.shape[:-1], -1)
    return dx.transpose(0, 1) if ctx.height else dx


def row_parameter_gradients(ctx: Any, dy: Tensor, x: Tensor | None, needs_bias: bool) -> list[Any]:
    """Gradients of weight and bias; None for the weight's without x."""
    dw = None
    dy = dy[: ctx.length].reshape(-1, dy.shape[-1])
    if x is not None:
        # Same token order on both sides; sequence-major costs no full-size copy.
        x = x.transpose(0, 1) if ctx.height else x
        dw = dy.t() @ x.reshape(-1, x.shape[-1])
    return pack((dw, dy.sum(0) if needs_bias else None), ctx.specs)
