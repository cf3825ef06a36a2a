"""One rank of a world that is not there: a fake process group and tensors without memory.

Must not know what is run inside. The collectives of a fake world return at once with arbitrary
values: a simulation counts and never computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_sp.errors import ConfigError


@contextmanager
def fake_world(size: int, rank: int = 0) -> Iterator[DeviceMesh]:
    """Be one rank of a world of `size`, in this process alone, with no communication.

    Yields a mesh over the whole world with one axis, `tp`. It is built here because a mesh reads
    its ranks back from a tensor, which a fake tensor cannot give: make any other mesh before
    entering `fake_tensors` too.

    Raises:
        ConfigError: if `rank` is not a rank of that world, or torch.distributed is already running.
    """
    if not 0 <= rank < size:
        raise ConfigError(
            "that rank is not in that world",
            where="fake_world(size, rank)",
            got=f"size={size}, rank={rank}",
            rule="0 <= rank < size",
        )
    if dist.is_initialized():
        raise ConfigError(
            "a fake world cannot start beside a real one",
            where="fake_world(size, rank)",
            got=f"torch.distributed runs on {dist.get_backend()}, {dist.get_world_size()} ranks",
            rule="a simulation needs a process without a process group",
            remedy="run it outside the launcher, or after dist.destroy_process_group()",
        )
    # Private, alike in torch 2.11 to 2.14: importing it registers the "fake" backend, and no public
    # module does.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_tensors(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """Make tensors that have shapes and storages but no memory; new ones are of `dtype`.

    Build the model inside: a model is made in `dtype`, as `.to(dtype)` cannot swap fake parameters.

    transformers cannot look into fake position ids, takes every batch for a packed one, and builds
    the [S, S] causal mask that a real run skips. Select an attention it makes no mask for, as
    scripts/bench/step_cost.py does, to count what a real run keeps.
    """
    # Private; FakeTensorMode has no public path in torch 2.11 to 2.14.
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.get_default_dtype()
    # Kernels keep tables and scalars that were made outside: let them in.
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
