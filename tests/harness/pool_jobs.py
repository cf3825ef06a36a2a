"""Rank functions for test_pool: each shows one behaviour of the pool."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def rank_and_sum(value: int) -> tuple[int, int, int]:
    """(rank, pid, value summed over the ranks)."""
    total = torch.tensor([value])
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), int(total)


def first_random() -> float:
    """A draw from the default generator."""
    return torch.rand(()).item()


def echo(value: torch.Tensor) -> torch.Tensor:
    """The argument, plus the rank."""
    return value + dist.get_rank()


def raise_everywhere() -> None:
    """Fails on each rank, with its own message."""
    raise ValueError(f"no luck on {dist.get_rank()}")


def raise_on_last_while_others_wait() -> None:
    """The last rank fails; its peers are left in a collective."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the only one that knows")
    dist.barrier()


def die_on_first() -> None:
    """Rank 0 leaves without a word."""
    if dist.get_rank() == 0:
        os._exit(7)


def sleep_on_first(seconds: float) -> None:
    """Rank 0 hangs outside of any collective; the others finish their part."""
    if dist.get_rank() == 0:
        time.sleep(seconds)


def leave_default_dtype() -> None:
    """Forgets to put the default dtype back."""
    torch.set_default_dtype(torch.float64)


def leave_grad_off() -> None:
    """Forgets to put the gradient mode back."""
    torch.set_grad_enabled(False)
