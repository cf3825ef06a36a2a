"""Are copies still copies? Digests of what several ranks hold alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sp.comm import collectives as comm
from hf_sp.errors import ConfigError, ReplicaError
from hf_sp.state import ParallelState, parallel_state


def check_replicas(model: nn.Module) -> None:
    """Whether every rank holds the same bits of what the ranks hold alike.

    Norms, row biases and whole linears on the tp ranks, shards on the groups of ``dp_replicate``,
    buffers on all. To be called on every rank of a running job, between two steps: every some
    hundred, say.

    Collectives: 1 all-gather of 8 bytes a tensor, and 1 of a byte a tensor.

    Raises:
        ReplicaError: on every rank, naming the tensors whose copies differ.
        ConfigError: the model is not parallelized.
    """
    state = parallel_state(model)
    if state is None:
        raise ConfigError(
            "check_replicas takes a parallelized model",
            got=type(model).__name__,
            remedy="hf_sp.parallelize(model, ...) comes first",
        )
    if names := unequal_replicas(model, state):
        raise ReplicaError(
            "copies that have to be equal on the ranks differ",
            where="\n".join(names[:10]) + ("\n..." if len(names) > 10 else ""),
            got=f"{len(names)} tensors with different bits",
            rule="replicated parameters get the same gradient and the same update on every rank",
            remedy="look for a write that one rank alone has made (an 'if rank == 0:', weights "
            "loaded on one rank, a generator that differs), or a gradient that was not summed",
        )


def unequal_replicas(model: nn.Module, state: ParallelState, gradients: bool = False) -> list[str]:
    """Names of parameters and buffers whose copies differ, the same on every rank."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {**parameters, **dict(model.named_buffers())}
    if gradients:
        found = ((f"gradient of {n}", p.grad) for n, p in parameters.items())
        tensors = {name: grad for name, grad in found if grad is not None}
    if not tensors or state.everyone.size == 1:
        return []
    home = state.mesh.device_type
    digests = torch.stack([_digest(t, home) for t in tensors.values()])
    everyone = comm.all_gather(digests[None], state.everyone)
    rows = {rank: i for i, rank in enumerate(state.whole.mesh.flatten().tolist())}
    wrong = torch.zeros(len(tensors), dtype=torch.uint8)
    table = everyone.cpu()
    mine = table[state.everyone.rank]
    for i, t in enumerate(tensors.values()):
        copies = [rows[rank] for rank in _copies(t, rows) if rank in rows]
        wrong[i] = bool((table[copies, i] != mine[i]).any())
    anywhere = comm.all_gather(wrong[None].to(home), state.everyone).amax(0).cpu()
    return [name for name, bad in zip(tensors, anywhere.tolist(), strict=True) if bad]


def _digest(tensor: Tensor, device: str) -> Tensor:
    here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not here.numel():
        return torch.zeros((), dtype=torch.int64, device=device)
    return torch.hash_tensor(here.detach().to(device)).view(torch.int64)


def _copies(tensor: Tensor, everyone: Iterable[int]) -> list[int]:
    """Ranks that hold what this rank holds of a tensor."""
    if not isinstance(tensor, DTensor):
        return list(everyone)
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert place is not None
    own = [
        slice(None) if placement.is_replicate() else slice(at, at + 1)
        for placement, at in zip(tensor.placements, place, strict=True)
    ]
    return mesh.mesh[tuple(own)].flatten().tolist()
