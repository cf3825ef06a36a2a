"""What the experts of a sparse layer keep and move, in closed form.

Owns: bytes for gated experts in 16 bit under hf_sp, split by features over t = tp ranks or whole
over ep ranks, which are those of tp or of tp * dp_shard. The measured counts are held against
these. Must not know: torch.

Terms, per row, a token at one of its k experts:
    4f          gate and up, 16 bit (4f/t where features are split)
    w + 4       the routing weight, in 16 bit or as Mixtral's router makes it, and the row's place
    4           its place among the rows that arrive, where tokens travel
and per token the router's float32 probabilities and int64 choices: 4E + 8k, and 4k + 4 where the
routing weights are normalized.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """Shape of a sparse layer's experts.

    Attributes:
        hidden: width h of the residual stream.
        intermediate: width f of one expert.
        experts: their number E.
        choices: experts of one token, k.
        routing_weight: bytes w of one: 2, or 4 where the router leaves it in float32 (Mixtral).
        normalized: whether a token's routing weights are divided by their sum.
    """

    hidden: int
    intermediate: int
    experts: int
    choices: int
    routing_weight: int = 2
    normalized: bool = False

    @property
    def router_bytes(self) -> int:
        """Probabilities and choices of one token; the chosen ones and their sum before division."""
        divided = 4 * self.choices + 4 if self.normalized else 0
        return 4 * self.experts + 8 * self.choices + divided


def split_experts_bytes_per_token(shape: ExpertsShape, tp: int) -> float:
    """Features split: every rank routes every token. k (4f/t + w + 4) + 4E + 8k."""
    row = 4 * shape.intermediate / tp + shape.routing_weight + 4
    return shape.choices * row + shape.router_bytes


def travelling_experts_bytes_per_token(shape: ExpertsShape, tp: int) -> float:
    """Whole experts, an even router: (k (4f + w + 8) + 4E + 8k)/t for a token of a group.

    The same for ep = tp and ep = tp * dp_shard: then as many rows come from other groups as leave
    for them. A rank that gets a share x of all rows instead of 1/ep keeps 4f + w + 4 bytes for
    each.
    """
    row = 4 * shape.intermediate + shape.routing_weight + 8
    return (shape.choices * row + shape.router_bytes) / tp


def split_experts_moved_per_token(shape: ExpertsShape, tp: int) -> float:
    """Bytes that a rank sends in a step for a token of the whole sequence: 10 h (t - 1)/t.

    Five times the block's input or output: all-gathers of x, of dy, and of x again; reduce-scatters
    of the output and of dx.
    """
    return 5 * 2 * shape.hidden * (tp - 1) / tp


def travelling_experts_moved_per_token(
    shape: ExpertsShape, tp: int, ep: int | None = None
) -> float:
    """Bytes that a rank sends in a step, an even router: k/t (10 h + 2w) (ep - 1)/ep.

    Five times the rows of its own tokens or what comes back for them, T k/t each: x, y, dy, dx,
    and x again for the weight gradient; and twice their routing weights. So tokens that travel move
    k/t of what gathering them all does: less if and only if k < t. T is a group's own tokens.

    Args:
        shape: the layer's.
        tp: ranks that a group's tokens are split over.
        ep: ranks that experts are split over; tp if None.
    """
    ep = ep or tp
    row = 5 * 2 * shape.hidden + 2 * shape.routing_weight
    return shape.choices / tp * row * (ep - 1) / ep


def experts_weight_bytes(shape: ExpertsShape) -> int:
    """All experts' weights in 16 bit: 2 E 3 f h."""
    return 2 * shape.experts * 3 * shape.intermediate * shape.hidden


def fsdp_experts_moved(shape: ExpertsShape, tp: int, dp_shard: int) -> float:
    """Bytes of weights that a rank sends in a step, experts in FSDP: 3 (2 E 3 f h)/t (D - 1)/D.

    Its part of 1/(t D) goes to D - 1 ranks, before the forward and before the backward, and its
    gradients of 1/t leave for the others: whatever the number of tokens. None with
    ep = tp * dp_shard.
    """
    return 3 * experts_weight_bytes(shape) / tp * (dp_shard - 1) / dp_shard
