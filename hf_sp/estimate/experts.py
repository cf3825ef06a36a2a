"""What the experts of a sparse layer keep and move, in closed form.

Owns: bytes for gated experts in 16 bit under hf_sp, split by features over t = tp ranks or whole
over ep = tp ranks. The measured counts are held against these. Must not know: torch.

Terms, per row, a token at one of its k experts:
    4f          gate and up, 16 bit (4f/t where features are split)
    2 + 4       the routing weight, 16 bit, and the row's place
    4           its place among the rows that arrive, where tokens travel
and per token the router's float32 probabilities and int64 choices: 4E + 8k.
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
    """

    hidden: int
    intermediate: int
    experts: int
    choices: int

    @property
    def router_bytes(self) -> int:
        """Probabilities and choices of one token."""
        return 4 * self.experts + 8 * self.choices


def split_experts_bytes_per_token(shape: ExpertsShape, tp: int) -> float:
    """Features split: every rank routes every token. k (4f/t + 6) + 4E + 8k."""
    return shape.choices * (4 * shape.intermediate / tp + 6) + shape.router_bytes


def travelling_experts_bytes_per_token(shape: ExpertsShape, ep: int) -> float:
    """Whole experts, an even router: (k (4f + 10) + 4E + 8k)/ep for a token of the whole sequence.

    A rank that gets a share x of all rows instead of 1/ep keeps 4f + 6 bytes for each of them.
    """
    return (shape.choices * (4 * shape.intermediate + 10) + shape.router_bytes) / ep


def split_experts_moved_per_token(shape: ExpertsShape, tp: int) -> float:
    """Bytes that a rank sends in a step for a token of the whole sequence: 10 h (t - 1)/t.

    Five times the block's input or output: all-gathers of x, of dy, and of x again; reduce-scatters
    of the output and of dx.
    """
    return 5 * 2 * shape.hidden * (tp - 1) / tp


def travelling_experts_moved_per_token(shape: ExpertsShape, ep: int) -> float:
    """Bytes that a rank sends in a step, an even router: k/ep (10 h + 4) (ep - 1)/ep.

    Five times the rows of its own tokens or what comes back for them, T k/ep each: x, y, dy, dx,
    and x again for the weight gradient; and twice their routing weights. So tokens that travel move
    k/ep of what gathering them all does: less if and only if k < ep.
    """
    return shape.choices / ep * (5 * 2 * shape.hidden + 4) * (ep - 1) / ep
