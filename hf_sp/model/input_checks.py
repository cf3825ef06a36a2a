"""Are all ranks of a tp group given the same batch, and is the model still the one we made?

Asked on the first forwards only, of training, evaluation and decoding each, by a digest of fixed
size: ranks with different shapes get an error that names the cause, where the first activation
collective would have hung.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_sp.comm import collectives as comm
from hf_sp.errors import BatchMismatchError, ConfigError
from hf_sp.state import ParallelState


def check_forward(model: nn.Module, state: ParallelState, inputs: dict[str, Any]) -> None:
    """Compare this forward's inputs over the tp ranks, on the first forwards.

    With data parallel groups all ranks learn of it if one group's batches differ; and that all
    groups train the same parameters: ids or embeddings, with or without labels.

    Collectives: 1 all-gather of 40 bytes a rank, and a synchronisation, while checks are left.

    Raises:
        BatchMismatchError: on every rank, naming the inputs that differ.
        ConfigError: on every rank, if a parameter was added after ``parallelize``, or if dropout
            is active on replicated tensors and the ranks' generators are not in the same state.
    """
    tensors = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    tokens = tensors.get("input_ids", tensors.get("inputs_embeds"))
    decoding = tokens is not None and tokens.shape[1:2] == (1,) and not torch.is_grad_enabled()
    # Groups whose prompts have other lengths have to count alike.
    decoding = decoding and state.data == 1
    kind = "training" if model.training else "decoding" if decoding else "evaluation"
    if state.checks_left[kind] <= 0 or not all(type(t) is Tensor for t in tensors.values()):
        return
    state.checks_left[kind] -= 1
    _check_parameters(model)
    if state.everyone.size == 1 or dist.get_backend(state.group) == "fake":
        return
    structure, summary = _structure(tensors, inputs), _values(tensors)
    roles = sum(2**i for i, n in enumerate(_ROLES) if inputs.get(n) is not None)
    mine = torch.tensor([roles, zlib.crc32(structure.encode()), _random(model, state)])
    mine = torch.cat([mine.to(summary.device), summary]).to(state.mesh.device_type)
    everyone = comm.all_gather(mine[None], state.everyone).view(state.data, state.tp, -1)
    roles_of, structures, generators, digests, sums = everyone.unbind(-1)
    if bool((generators != generators[:, :1]).any()):
        raise ConfigError(
            "the ranks' random generators differ",
            where=", ".join(n for n, m in model.named_modules() if _drops(m)),
            rule="dropout on what all ranks hold alike has to drop the same places on each",
            remedy="seed all ranks alike (transformers.set_seed; Trainer does it by itself)",
        )
    same = all(bool((x == x[:, :1]).all()) for x in (structures, digests))
    # Float inputs (inputs_embeds) may differ in their last bits where their kernels do.
    totals = sums.contiguous().view(torch.float64)
    close = torch.allclose(totals, totals[:, :1].expand_as(totals), rtol=1e-3, equal_nan=True)
    if not (same and close):
        _raise_mismatch(tensors, inputs, state)
    if model.training and bool((roles_of != roles_of[0, 0]).any()):
        raise ConfigError(
            "data parallel groups were given inputs of different kinds",
            where=", ".join(_ROLES),
            got=f"here {[n for n in _ROLES if inputs.get(n) is not None]}",
            rule="FSDP reduces the gradients of the same parameters on all of them",
            remedy="give all groups ids or all embeddings, and all or none labels",
        )


_ROLES = ("input_ids", "inputs_embeds", "labels")


def _drops(module: nn.Module) -> bool:
    # Noise on what all ranks hold alike has to be the same, as dropout.
    jitters = float(getattr(module, "jitter_noise", 0) or 0) > 0
    return module.training and (jitters or (isinstance(module, nn.Dropout) and module.p > 0))


def _random(model: nn.Module, state: ParallelState) -> int:
    """Digest of the generators that dropout would draw from, 0 if there is none to draw."""
    if not any(_drops(m) for m in model.modules()):
        return 0
    # The CPU's in any case: seeds of masks are drawn from it.
    digest = zlib.crc32(torch.get_rng_state().numpy().tobytes())
    if state.mesh.device_type != "cpu":
        other = torch.get_device_module(state.mesh.device_type).get_rng_state()
        digest = zlib.crc32(other.numpy().tobytes(), digest)
    return digest


def _structure(tensors: dict[str, Tensor], inputs: dict[str, Any]) -> str:
    present = sorted(k for k, v in inputs.items() if v is not None)
    shapes = {k: (tuple(t.shape), str(t.dtype)) for k, t in sorted(tensors.items())}
    return f"{present} {shapes} {_scalars(inputs)}"


def _scalars(inputs: dict[str, Any]) -> dict[str, str]:
    """Inputs that are plain numbers (``num_items_in_batch``), by name."""
    return {k: repr(v) for k, v in sorted(inputs.items()) if isinstance(v, int | float)}


def _values(tensors: dict[str, Tensor]) -> Tensor:
    """``[digest of the integer inputs, bits of the float inputs' sum]``, int64."""
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    digest = torch.zeros((), dtype=torch.int64, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for index, (_, tensor) in enumerate(sorted(tensors.items())):
        if tensor.is_floating_point():
            total += tensor.detach().sum(dtype=torch.float64).to(device)
        elif not tensor.is_complex():
            flat = tensor.flatten().to(device, torch.int64)
            # Odd weights that depend on the place, so that swapped rows are seen; int64 wraps.
            weights = torch.arange(flat.numel(), device=device) * 2654435761 + 2 * index + 1
            digest += ((flat + 1) * (weights | 1)).sum()
    return torch.stack([digest, total.view(torch.int64)])


def _raise_mismatch(
    tensors: dict[str, Tensor], inputs: dict[str, Any], state: ParallelState
) -> None:
    mine = {k: _describe(t) for k, t in tensors.items()}
    mine |= _scalars(inputs)
    mine |= {k: "given" for k, v in inputs.items() if v is not None and k not in mine}
    everyone: list[dict[str, str]] = [{} for _ in range(state.everyone.size)]
    dist.all_gather_object(everyone, mine, group=state.all_ranks)
    names = sorted({k for rank in everyone for k in rank})
    rows = []
    for group in range(state.data):
        ranks = everyone[group * state.tp : (group + 1) * state.tp]
        of = f" of group {group}" if state.data > 1 else ""
        for name in names:
            seen = [rank.get(name, "missing") for rank in ranks]
            if len(set(seen)) > 1:
                rows += [f"{name}, tp rank {i}{of}: {text}" for i, text in enumerate(seen)]
    raise BatchMismatchError(
        "the ranks of one tensor-parallel group were given different batches",
        where="\n".join(rows) or "float inputs whose sums differ",
        rule="every rank of a tp group is given the same whole batch; hf_sp shards it inside",
        remedy="shard the data over data-parallel ranks only: no DistributedSampler over tp "
        "ranks, the same seed and shuffling on all of them (Trainer does this by itself)",
    )


def _describe(tensor: Tensor) -> str:
    text = f"shape {tuple(tensor.shape)}"
    if tensor.numel() and not tensor.is_floating_point() and not tensor.is_complex():
        digest = int(_values({"": tensor})[0]) % 2**32
        text += f", first value {int(tensor.flatten()[0])}, digest {digest:08x}"
    return text


def _check_parameters(model: nn.Module) -> None:
    plain = [n for n, p in model.named_parameters() if not isinstance(p, DTensor)]
    if plain:
        raise ConfigError(
            "the model was given parameters after parallelize",
            where="\n".join(plain[:5]) + ("\n..." if len(plain) > 5 else ""),
            rule="every parameter is a DTensor on the model's mesh; a plain one would be trained "
            "on this rank's part of the gradient",
            remedy="build the whole model first, parallelize it last",
        )
