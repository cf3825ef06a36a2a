"""Launch settings of the kernels: one fixed table, so that all ranks and all runs launch alike.

A benchmark may hand the launchers others. Must not know kernels or tensors. There is no tuning at
run time: it stalls the first step, and lets each rank choose for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# The widest tile that stays in registers: beyond, the compiler spills (backward: already at 16384).
MAX_FORWARD = 16384
MAX_BACKWARD = 8192


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        warps: warps per program.
        rows: rows per tile (norms).
        stages: depth of the load pipeline of a loop over rows (norm backward).
        per_sm: programs per multiprocessor (norm backward); each holds one partial weight gradient.
        block: elements per tile (swiglu, cross entropy).
    """

    warps: int
    rows: int = 1
    stages: int = 1
    per_sm: int = 1
    block: int = 1024


# Both SwiGLU kernels: eight bf16 elements (16 bytes) per thread and tensor.
SWIGLU = LaunchConfig(warps=4, block=1024)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


@cache
def norm_forward(n: int) -> LaunchConfig:
    """Forward settings for rows of n elements: 4096 elements per tile, then one row."""
    width = next_power_of_2(n)
    if width <= 4096:
        return LaunchConfig(warps=4, rows=min(32, max(1, 4096 // width)))
    return LaunchConfig(warps=8 if width <= 8192 else 16)


@cache
def norm_backward(n: int) -> LaunchConfig:
    """Backward settings for rows of n elements."""
    width = next_power_of_2(n)
    if width <= 256:
        return LaunchConfig(warps=4, rows=min(32, 2048 // width), stages=2, per_sm=16)
    if width <= 1024:
        # Half the tile of the others: with 2048 elements triton 3.7 spills, at 896.
        return LaunchConfig(warps=4, rows=1024 // width, stages=2, per_sm=8)
    if width <= 2048:
        return LaunchConfig(warps=4, stages=2, per_sm=4)
    return LaunchConfig(warps=8 if width <= 4096 else 16, stages=2, per_sm=2)
