"""PEFT's LoRA layers over parallel linears: what ``peft`` calls, what ``low_rank`` computes.

A stock ``lora.Linear`` becomes one of these by changing its class, as the linears do, so that its
adapters, names and identity stay and PEFT's own code (switching, merging, deleting) goes on.
Sizes of factors are the *whole* ones everywhere but in the tensors that a forward computes with.

Shape letters: B batch, S sequence, H hidden, O / o whole and local out features, f local in
features, V / v whole and local vocabulary, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from hf_sp.comm import collectives as comm
from hf_sp.comm import pairs
from hf_sp.comm.shard import with_local
from hf_sp.errors import ConfigError
from hf_sp.model.columns import Factor
from hf_sp.model.dropout import Dropout
from hf_sp.model.local import autocast_dtype, cast_for_autocast, local
from hf_sp.model.low_rank import low_rank
from hf_sp.model.parameters import PARTIAL
from hf_sp.model.ports import low_rank_column

_FACTOR = "_hf_sp_dora_factor"


class ParallelLora:
    """What the parallel LoRA layers share. Before a stock layer class in the bases."""

    # Placements of A, B and DoRA's magnitude.
    placements: tuple[Placement, Placement, Placement]

    @classmethod
    def take_over(cls, layer: Any) -> None:
        """Make a stock LoRA layer one of these, in place."""
        layer.__class__ = cls

    # --- which pairs -------------------------------------------------------------------------

    def _factors(self: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def _names(self: Any) -> Any:
        return self.lora_A.keys()

    def _used(self: Any) -> list[str]:
        """The adapters that this forward adds."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self._names()]

    def _probability(self: Any, adapter: str) -> float:
        module = self.lora_dropout[adapter]
        return module.p if isinstance(module, nn.Dropout) and module.training else 0.0

    def _draw(self: Any, adapter: str) -> Dropout | None:
        return Dropout.draw(self._probability(adapter))

    # --- forward -----------------------------------------------------------------------------

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's result and that of the active adapters."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError(
                "adapter_names is not supported for a parallelized model",
                where=type(self).__name__,
                rule="one forward uses the same adapters for the whole batch",
                remedy="set_adapter(...), and one forward for each adapter",
            )
        for key in VARIANT_KWARG_KEYS:
            kwargs.pop(key, None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        used = self._used()
        if not used:
            return result
        dtype = result.dtype
        for adapter in used:
            result = self._add(adapter, x, result)
        return result.to(dtype)

    def _add(self: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        return result + self._delta(adapter, x)

    # --- merging: local products are the shards of the whole product -----------------------------

    def _local_delta(self: Any, adapter: str) -> Tensor:
        """This rank's part of ``s B A``, as the base weight's."""
        A, B = (local(p).detach() for p in self._factors(adapter))
        dtype = B.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return ((B.to(wide) @ A.to(wide)) * self.scaling[adapter]).to(dtype)

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """``s B A`` as a DTensor, placed as the base weight."""
        weight = self.get_base_layer().weight
        return with_local(self._local_delta(adapter), weight)

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight. To be called on every rank.

        Args:
            safe_merge: refuse, on every rank, a result that is not finite.
            adapter_names: which; the active ones if None.
        """
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self._names():
                continue
            weight = local(self.get_base_layer().weight).detach()
            merged = self._merged(adapter, weight)
            if safe_merge:
                bad = (~torch.isfinite(merged)).any().float()
                if comm.all_reduce(bad[None], self._axis()).item():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter} seems to be "
                        "broken"
                    )
            weight.copy_(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self: Any) -> None:
        """Take the merged adapters out of the base weight again, the last one first."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self._names():
                weight = local(self.get_base_layer().weight).detach()
                weight.copy_(self._unmerged(adapter, weight))

    def _merged(self: Any, adapter: str, weight: Tensor) -> Tensor:
        return weight + self._local_delta(adapter).to(weight.dtype)

    def _unmerged(self: Any, adapter: str, weight: Tensor) -> Tensor:
        return weight - self._local_delta(adapter).to(weight.dtype)

    def _axis(self: Any) -> comm.Axis:
        return self.get_base_layer().axis


class _ParallelLoraLinear(ParallelLora, LoraLinear):
    """LoRA and DoRA on a block's linear.

    DoRA (Liu et al. 2024, arXiv:2402.09353) scales each output row by ``m / norm(W + s B A)``, the
    norm held constant in backward.
    """

    def _add(self: Any, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        delta = self._delta(adapter, x)
        if adapter not in self.lora_magnitude_vector:
            return result + delta
        scale, bias = self._scale(adapter), self._bias(x)
        if bias is not None and self._adds_bias():
            return (result - bias) * scale + delta * scale + bias
        return (result + delta) * scale

    def _bias(self: Any, x: Tensor) -> Tensor | None:
        return self.base_layer.local_parameters(x)[1]

    def _adds_bias(self: Any) -> bool:
        return True

    def _scale(self: Any, adapter: str) -> Tensor:
        """``m / norm``, of the rows that this rank computes."""
        magnitude = local(self.lora_magnitude_vector[adapter].weight)
        return self._rows(self._summed(magnitude)) / self._rows(self._norm(adapter))

    @torch.no_grad()
    def _norm(self: Any, adapter: str) -> Tensor:
        """Norm of each local row of ``W + s B A``."""
        weight = local(self.base_layer.weight) + self._local_delta(adapter)
        return self._row_norm(weight).to(weight.dtype)

    def _row_norm(self: Any, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=1)

    def _rows(self: Any, tensor: Tensor) -> Tensor:
        rows = self.base_layer.rows
        return tensor if rows is None else tensor.narrow(0, *rows)

    def _summed(self: Any, parameter: Tensor) -> Tensor:
        """A parameter whose gradient each rank has a part of only."""
        return pairs.identity_allreduce(parameter, self._axis())

    def _merged(self: Any, adapter: str, weight: Tensor) -> Tensor:
        if adapter not in self.lora_magnitude_vector:
            return super()._merged(adapter, weight)
        if len(self.merged_adapters) > 0:
            raise ConfigError(
                "a DoRA adapter cannot be merged on top of another adapter",
                where=adapter,
                rule="its magnitude is relative to the unmerged weight",
                remedy="unmerge first",
            )
        factor = local(self.lora_magnitude_vector[adapter].weight).detach() / self._norm(adapter)
        self.__dict__.setdefault(_FACTOR, {})[adapter] = factor
        merged = factor[:, None] * (weight + self._local_delta(adapter))
        return merged.to(weight.dtype)

    def _unmerged(self: Any, adapter: str, weight: Tensor) -> Tensor:
        factor = self.__dict__.get(_FACTOR, {}).pop(adapter, None)
        if factor is None:
            return super()._unmerged(adapter, weight)
        return (weight / factor[:, None]).to(weight.dtype) - self._local_delta(adapter)


class ColumnLoraLinear(_ParallelLoraLinear):
    """LoRA on a column linear: A replicated, B the local rows.

    Shapes:   x [B, S, H] gathered -> [B, S, o]
    Forward:  no collective
    Backward: none of its own: the gradient of A x shares the block's reduce-scatter, and all dA of
              a block one all-reduce
    Saves:    A x (``[B, S, r]``), A, B. Not x: the block's entry saves the shard
    """

    placements = (Replicate(), Shard(0), Shard(0))

    def entry_factors(self: Any, x: Tensor) -> list[Factor]:
        """A of each active adapter, as the coming forward uses it."""
        return [
            Factor(self.lora_A[name], self._node_factor(name, x), self._probability(name))
            for name in self._used()
        ]

    def _node_factor(self: Any, adapter: str, x: Tensor) -> Tensor:
        A = self.lora_A[adapter].weight
        direct = autocast_dtype(x) is None and not torch.compiler.is_compiling()
        return A if direct else cast_for_autocast(local(A), x)

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        gathered = self.base_layer.block.gathered
        port = None if gathered is None else gathered.port(self.lora_A[adapter], x)
        if port is not None:
            u = low_rank_column(x, port, gathered)
        else:
            # Changed on the way: an ordinary linear, which each rank has a part of the gradient of.
            A = cast_for_autocast(local(self.lora_A[adapter].weight), x)
            u = low_rank(x, pairs.identity_allreduce(A, self._axis()), self._draw(adapter), 0)
        B = local(self.lora_B[adapter].weight)
        if self.base_layer.rows is not None:
            B = self._rows(self._summed(B))
        return F.linear(u * self.scaling[adapter], B)

    def _summed(self: Any, parameter: Tensor) -> Tensor:
        # Sharded like the rows, unless the weight is stored whole (k/v heads fewer than tp).
        return super()._summed(parameter) if self.base_layer.rows is not None else parameter


class RowLoraLinear(_ParallelLoraLinear):
    """LoRA on a row linear: A the local columns, B replicated. Returns a partial sum, as the base.

    Shapes:   x [B, S, f] -> [B, S, H] partial
    Forward:  no collective (DoRA: 1 all-reduce of ``[H]``, of the rows' squared norms)
    Backward: 1 all-reduce of dB
    Saves:    x, ``A x`` (``[B, S, r]``), A, B
    """

    placements = (Shard(1), Replicate(), Replicate())

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        A, B = (local(p) for p in self._factors(adapter))
        axis, base = self._axis(), self.base_layer
        x = cast_for_autocast(x, x)
        # Other features on each rank: masks of its own.
        z = low_rank(x, cast_for_autocast(A, x), self._draw(adapter), axis.rank)
        z, B = z * self.scaling[adapter], self._summed(B)
        # As the base: permute the small input, not the full-size output.
        return F.linear(z.transpose(0, 1), B).transpose(0, 1) if base.sp else F.linear(z, B)

    def _adds_bias(self: Any) -> bool:
        return self._axis().rank == 0

    def _row_norm(self: Any, weight: Tensor) -> Tensor:
        squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)
        return comm.all_reduce(squares, self._axis()).sqrt()


class ReplicatedLoraLinear(_ParallelLoraLinear):
    """LoRA and DoRA on a linear with a whole weight.

    Where every rank computes alike (a classifier) nothing is partial. Inside a TP block (the gate
    of a shared expert) each rank's gradients are a part, as its base weight's.

    Backward: in a TP block 1 all-reduce for each factor, else none
    """

    placements = (Replicate(), Replicate(), Replicate())

    def _axis(self: Any) -> comm.Axis:
        return comm.Axis.of(self.get_base_layer().weight.device_mesh)

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        A, B = (self._summed(local(p)) for p in self._factors(adapter))
        x = cast_for_autocast(x, x)
        u = low_rank(x, cast_for_autocast(A, x), self._draw(adapter), 0)
        return F.linear(u * self.scaling[adapter], B)

    def _summed(self: Any, parameter: Tensor) -> Tensor:
        partial = getattr(self.get_base_layer(), PARTIAL, False)
        return super()._summed(parameter) if partial else parameter

    def _bias(self: Any, x: Tensor) -> Tensor | None:
        bias = self.get_base_layer().bias
        return None if bias is None else cast_for_autocast(local(bias), x)

    def _rows(self: Any, tensor: Tensor) -> Tensor:
        return tensor
