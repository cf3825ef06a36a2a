"""Whole experts on each rank: tokens travel to their experts and the results travel back.

Each rank routes the tokens of its own sequence shard and sends a token to each of its k experts
once. No capacity: nothing is dropped, and ranks exchange as many rows as there are.

Shape letters: T tokens of this rank, k experts a token, E experts, e = E / ep local experts,
R rows (token, choice) of this rank's tokens, Q rows that arrive here, H hidden, f features.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sp.comm import collectives as comm
from hf_sp.comm.autograd import once_differentiable
from hf_sp.comm.collectives import Axis
from hf_sp.moe.experts import Order, Place, Weights, experts_backward, experts_forward
from hf_sp.moe.grouped import Groups, grouped_input_gradient, grouped_weight_gradient
from hf_sp.torch_private import is_fake


@dataclass(slots=True)
class Route:
    """Who sends how many rows to whom, for one block and forward.

    Args:
        order: this rank's rows, sorted by expert and so by destination.
        arrived: ``[Q]`` order by local expert of the rows that arrive, which come rank by rank.
        groups: where each local expert's rows end.
        send: rows that go to each rank.
        receive: rows that come from each rank.
    """

    order: Order
    arrived: Tensor
    groups: Groups
    send: list[int]
    receive: list[int]

    @classmethod
    def of(cls, index_Tk: Tensor, local: int, axis: Axis) -> Route:
        """Agree on the numbers: 1 all-to-all of E integers, 1 synchronisation.

        Args:
            index_Tk: the experts of this rank's tokens; E for a token that stays at home.
            local: e, number of experts on each rank.
            axis: the ranks.
        """
        order = Order.of(index_Tk, 0, local * axis.size)
        mine = order.counts()
        ones = [local] * axis.size
        theirs = comm.all_to_all(mine, ones, ones, axis)
        # The estimate's tensors have no values: an even router then.
        even = [[order.rows.shape[0] // len(mine)] * len(mine)] * 2
        sent, got = even if is_fake(index_Tk) else torch.stack([mine, theirs]).tolist()
        starts = range(0, len(sent), local)
        send, receive = ([sum(n[i : i + local]) for i in starts] for n in (sent, got))
        order.keep(sum(send))
        experts = torch.arange(local, device=theirs.device).repeat(axis.size)
        experts = experts.repeat_interleave(theirs, output_size=sum(receive))
        ends = theirs.view(axis.size, local).sum(0).cumsum(0).to(torch.int32)
        host = list(itertools.accumulate(sum(got[i::local]) for i in range(local)))
        return cls(order, torch.argsort(experts, stable=True), Groups(ends, host), send, receive)

    def launch_there(self, rows: Tensor, axis: Axis) -> Tensor:
        """Send this rank's sorted rows to their experts."""
        return comm.launch_all_to_all(rows, self.receive, self.send, axis)

    def land_there(self, launched: Tensor) -> Tensor:
        """The rows of this rank's experts, sorted by them."""
        return comm.wait(launched).index_select(0, self.arrived)

    def there(self, rows: Tensor, axis: Axis) -> Tensor:
        """This rank's sorted rows -> the rows of this rank's experts, sorted by them."""
        return self.land_there(self.launch_there(rows, axis))

    def launch_back(self, rows: Tensor, axis: Axis) -> Tensor:
        """The way back of ``there``; wait for it before reading."""
        home = torch.empty_like(rows).index_copy_(0, self.arrived, rows)
        return comm.launch_all_to_all(home, self.send, self.receive, axis)


@dataclass(slots=True)
class Sent:
    """Tokens and their routing weights on their way to the experts; see ``send``.

    Args:
        route: who sends what.
        rows: ``[Q, H]`` in flight.
        scale: ``[Q]`` in flight.
    """

    route: Route
    rows: Tensor | None
    scale: Tensor | None

    def land(self) -> tuple[Tensor, Tensor]:
        """Rows and routing weights, sorted by expert. Once: they are not kept for it."""
        rows, scale, self.rows, self.scale = self.rows, self.scale, None, None
        assert rows is not None
        assert scale is not None
        return self.route.land_there(rows), self.route.land_there(scale)


@torch.no_grad()
def send(x_TH: Tensor, index_Tk: Tensor, scale_Tk: Tensor, local: int, axis: Axis) -> Sent:
    """Launch tokens and routing weights to their experts, for ``travelling_experts``.

    Outside of that Function, so that others may run meanwhile, with autograd nodes of their own;
    what arrives there has no gradient path but the Function's.

    Shapes:   x [T, H], index and scale [T, k]
    Forward:  3 all-to-alls: E counts, waited for; rows [R, H] and their scales [R], in flight

    Args:
        x_TH: this rank's tokens.
        index_Tk: their experts; E and above: none.
        scale_Tk: their routing weights.
        local: e, number of experts on each rank.
        axis: the ranks that the experts are split over, in rank order.
    """
    route = Route.of(index_Tk, local, axis)
    rows = route.launch_there(route.order.pick(x_TH), axis)
    scale = route.launch_there(scale_Tk.reshape(-1)[route.order.rows], axis)
    return Sent(route, rows, scale)


def travelling_experts(
    x_TH: Tensor,
    sent: Sent,
    scale_Tk: Tensor,
    weights: Weights,
    place: Place,
    axis: Axis,
) -> Tensor:
    """The experts' output for this rank's tokens, from whichever ranks their experts are on.

    Shapes:   x [T, H], scale [T, k], weights of e experts -> [T, H]
    Forward:  1 all-to-all: outputs [Q, H]; ``send`` has launched 3
    Backward: 3 all-to-alls: dy rows, dscale, dx rows, which the block's entry waits for; and the
              tokens' rows once more when it makes gate_up's gradient, if that is trained
    Saves:    gate and up [Q, 2f], and for each row scale and its places (4 and 4 bytes), the
              weights; neither the rows that have arrived nor the experts' outputs. If x did not
              come from the block's entry, x too

    So a step moves ``5 R H`` numbers from each rank, R = T k (less what stays on the rank, 1 / ep
    of it for an even router): k / ep of what gathering all tokens does.

    Args:
        x_TH: this rank's tokens.
        sent: the same tokens on their way.
        scale_Tk: their routing weights.
        weights: of this rank's experts.
        place: where x comes from.
        axis: the ranks that the experts are split over, in rank order.
    """
    gate_up = weights.gate_up if place.entry is None else weights.gate_up.detach()
    return _TravellingExperts.apply(
        x_TH, sent, scale_Tk, gate_up, weights.down, place, weights.triton, axis
    )


class _TravellingExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        sent: Sent,
        scale_Tk: Tensor,
        gate_up: Tensor,
        down: Tensor,
        place: Place,
        triton: bool,
        axis: Axis,
    ) -> Tensor:
        route = sent.route
        order, weights = route.order, Weights(gate_up, down, triton)
        rows, scale = sent.land()
        y, kept = experts_forward(rows, scale, weights, route.groups)
        ctx.place, ctx.triton, ctx.axis = place, triton, axis
        ctx.order, ctx.host = order.without_tensors(), route.groups.host
        ctx.send, ctx.receive = route.send, route.receive
        own = None if place.entry is not None else x_TH
        places = (route.arrived.int(), route.groups.ends, *order.saved())
        ctx.save_for_backward(kept, scale, gate_up, down, own, *places)
        return order.sum_choices(comm.wait(route.launch_back(y, axis)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        kept, scale, gate_up, down, x_TH, arrived, ends, *rest = ctx.saved_tensors
        order, axis = ctx.order.restore(*rest), ctx.axis
        route = Route(order, arrived.long(), Groups(ends, ctx.host), ctx.send, ctx.receive)
        weights = Weights(gate_up, down, ctx.triton)
        launched = route.launch_there(order.pick(grads[0]), axis)
        if ctx.place.entry is not None:
            # Before this node's products, so that the next node's need not wait for what they send.
            ctx.place.entry.launch_beside()
        dy = route.land_there(launched)
        del launched
        dgate_up, dscale, ddown = experts_backward(
            dy, kept, scale, weights, route.groups, ctx.needs_input_grad[4]
        )
        # The few numbers first: they are here when the products are done, and do not wait for dx.
        dscale = route.launch_back(dscale, axis)
        # An input without a gradient has no entry to wait for what is sent there.
        drows = None
        if ctx.needs_input_grad[0]:
            drows = route.launch_back(grouped_input_gradient(dgate_up, gate_up, route.groups), axis)
        dscale = order.spread(comm.wait(dscale))

        def land() -> Tensor:
            assert drows is not None
            return order.sum_choices(comm.wait(drows))

        def make(x_TH: Tensor) -> Tensor:
            rows = route.there(order.pick(x_TH), axis)
            return grouped_weight_gradient(dgate_up, rows, route.groups)

        dx = dw = None
        if ctx.place.entry is None:
            dx = None if drows is None else land()
            dw = make(x_TH) if ctx.needs_input_grad[3] else None
        elif drows is not None:
            ctx.place.leave(land, make)
        return dx, None, dscale, dw, ddown, None, None, None
