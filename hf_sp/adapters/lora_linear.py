"""PEFT's LoRA layers over parallel linears: what ``peft`` calls, what ``low_rank`` computes.

A stock ``lora.Linear`` becomes one of these by changing its class, as the linears do, so that its
adapters, names and identity stay and PEFT's own code (switching, merging, deleting) goes on.
Sizes of factors are the *whole* ones everywhere but in the tensors that a forward computes with.

Shape letters: B batch, S sequence, H hidden, o local out features, f local in features, r rank.
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
from hf_sp.torch_packed import packed_shard

_FACTORS = "_hf_sp_dora_factors"


class ParallelLora:
    """What the parallel LoRA layers share. Before a stock layer class in the bases.

    DoRA (Liu et al. 2024, arXiv:2402.09353) scales each output row of a block's linear or of a
    classifier by ``m / norm(W + s B A)``, the norm held constant in backward.
    """

    axis: comm.Axis
    # Placements of A, B and DoRA's magnitude.
    placements: tuple[Placement, Placement, Placement]

    def _factors(self: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def _used(self: Any) -> list[str]:
        """The adapters that this forward adds."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.scaling]

    def _probability(self: Any, adapter: str) -> float:
        module = self.lora_dropout[adapter]
        return module.p if isinstance(module, nn.Dropout) and module.training else 0.0

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
            result = result + self._delta(adapter, x)
            if adapter in self.lora_magnitude_vector:
                scale, bias = self._scale(adapter), self._bias(x)
                result = result * scale if bias is None else (result - bias) * scale + bias
        return result.to(dtype)

    def _low_rank(self: Any, adapter: str, x: Tensor, A: Tensor, part: int = 0) -> Tensor:
        """``s A x`` for an x that is not a block's gathered input."""
        x = cast_for_autocast(x, x)
        drop = Dropout.draw(self._probability(adapter))
        return low_rank(x, cast_for_autocast(A, x), drop, part) * self.scaling[adapter]

    def _summed(self: Any, parameter: Tensor) -> Tensor:
        """A parameter whose gradient each rank has a part of only."""
        return pairs.identity_allreduce(parameter, self.axis)

    def _rows(self: Any, tensor: Tensor) -> Tensor:
        """Of something by output row, those that this rank computes."""
        whole = getattr(self.base_layer, "rows", None) is None
        return tensor if whole else self.base_layer.own_rows(tensor)

    # --- DoRA --------------------------------------------------------------------------------

    def _scale(self: Any, adapter: str) -> Tensor:
        magnitude = self._summed(local(self.lora_magnitude_vector[adapter].weight))
        return self._rows(magnitude) / self._rows(self._norm(adapter))

    def _bias(self: Any, x: Tensor) -> Tensor | None:
        """What the base has added, which is not scaled."""
        bias = self.base_layer.bias
        return None if bias is None else self._rows(self._summed(cast_for_autocast(local(bias), x)))

    @torch.no_grad()
    def _norm(self: Any, adapter: str) -> Tensor:
        """Norm of each local row of ``W + s B A``."""
        weight = local(self.base_layer.weight) + self._local_delta(adapter)
        return self._row_norm(weight).to(weight.dtype)

    def _row_norm(self: Any, weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=1)

    # --- merging: local products are the shards of the whole product -----------------------------

    def _local_delta(self: Any, adapter: str) -> Tensor:
        """This rank's part of ``s B A``, as the base weight's."""
        A, B = (local(p).detach() for p in self._factors(adapter))
        dtype = B.dtype
        wide = torch.promote_types(dtype, torch.float32)
        return ((B.to(wide) @ A.to(wide)) * self.scaling[adapter]).to(dtype)

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """``s B A`` as a DTensor, placed as the base weight."""
        return with_local(self._local_delta(adapter), self.get_base_layer().weight)

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight. To be called on every rank.

        Args:
            safe_merge: refuse, on every rank, a result that is not finite.
            adapter_names: which; the active ones if None.

        Raises:
            ConfigError: with data parallel ranks, where FSDP holds a part of a shard.
        """
        if self.get_base_layer().weight.device_mesh.ndim > 1:
            raise ConfigError(
                "adapters cannot be merged into a model with data parallel ranks",
                where=type(self).__name__,
                rule="a rank's part of the product is that of its tp shard, which FSDP has split",
                remedy="save_pretrained, and merge in one process",
            )
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.scaling:
                continue
            weight = local(self.get_base_layer().weight).detach()
            merged = weight + self._local_delta(adapter)
            if adapter in self.lora_magnitude_vector:
                merged = self._dora_factor(adapter)[:, None] * merged
            merged = merged.to(weight.dtype)
            if safe_merge:
                bad = (~torch.isfinite(merged)).any().float()
                if comm.all_reduce(bad[None], self.axis).item():
                    raise ValueError(f"NaNs detected in the merged weights of adapter {adapter}")
            weight.copy_(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self: Any) -> None:
        """Take the merged adapters out of the base weight again, the last one first."""
        while self.merged_adapters:
            adapter = self.merged_adapters.pop()
            if adapter in self.scaling:
                weight = local(self.get_base_layer().weight).detach()
                factor = self.__dict__.get(_FACTORS, {}).pop(adapter, None)
                merged = weight if factor is None else weight / factor[:, None]
                weight.copy_(merged - self._local_delta(adapter))

    def _dora_factor(self: Any, adapter: str) -> Tensor:
        if self.merged_adapters:
            raise ConfigError(
                "a DoRA adapter cannot be merged on top of another adapter",
                where=adapter,
                rule="its magnitude is relative to the unmerged weight",
                remedy="unmerge first",
            )
        factor = local(self.lora_magnitude_vector[adapter].weight).detach() / self._norm(adapter)
        self.__dict__.setdefault(_FACTORS, {})[adapter] = factor
        return factor


class ColumnLoraLinear(ParallelLora, LoraLinear):
    """LoRA on a column linear: A replicated, B the local rows.

    Shapes:   x [B, S, H] gathered -> [B, S, o]
    Forward:  no collective
    Backward: none of its own: the gradient of A x shares the block's reduce-scatter, and all dA of
              a block one all-reduce
    Saves:    A x (``[B, S, r]``), A, B. Not x: the block's entry saves the shard
    """

    @property
    def placements(self: Any) -> tuple[Placement, Placement, Placement]:  # type: ignore[override]
        """B as the rows, unless the weight is stored whole (k/v heads fewer than tp)."""
        base = self.get_base_layer()
        whole = packed_shard(0, base.segments) if base.segments else Shard(0)
        rows = whole if base.rows is None else Replicate()
        return Replicate(), rows, rows

    def entry_factors(self: Any, x: Tensor) -> list[Factor]:
        """A of each active adapter, as the coming forward uses it."""
        direct = autocast_dtype(x) is None and not torch.compiler.is_compiling()
        found = []
        for name in self._used():
            A = self.lora_A[name].weight
            A = A if direct else cast_for_autocast(local(A), x)
            found.append(Factor(self.lora_A[name], A, self._probability(name)))
        return found

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        block = self.base_layer.block
        gathered = block.gathered or block.before(x)
        port = None if gathered is None else gathered.port(self.lora_A[adapter], x)
        A, B = self._factors(adapter)
        if gathered is not None and port is not None:
            u = low_rank_column(x, port, gathered) * self.scaling[adapter]
        else:
            # Changed on the way: an ordinary linear, which each rank has a part of the gradient of.
            u = self._low_rank(adapter, x, pairs.identity_allreduce(local(A), self.axis))
        return F.linear(u, self._rows(self._summed(local(B))))

    def _summed(self: Any, parameter: Tensor) -> Tensor:
        return parameter if self.base_layer.rows is None else super()._summed(parameter)


class RowLoraLinear(ParallelLora, LoraLinear):
    """LoRA on a row linear: A the local columns, B replicated. Returns a partial sum, as the base.

    Shapes:   x [B, S, f] -> [B, S, H] partial
    Forward:  no collective (DoRA: 1 all-reduce of ``[H]``, of the rows' squared norms)
    Backward: 1 all-reduce of dB
    Saves:    x, ``A x`` (``[B, S, r]``), A, B
    """

    placements = (Shard(1), Replicate(), Replicate())

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        A, B = (local(p) for p in self._factors(adapter))
        # Other features on each rank: masks of its own.
        z, B = self._low_rank(adapter, x, A, self.axis.rank), self._summed(B)
        # As the base: permute the small input, not the full-size output.
        sp = self.base_layer.sp
        return F.linear(z.transpose(0, 1), B).transpose(0, 1) if sp else F.linear(z, B)

    def _bias(self: Any, x: Tensor) -> Tensor | None:
        bias = self.base_layer.bias
        if bias is None or (self.axis.rank > 0 and not bias.requires_grad):
            return None
        bias = cast_for_autocast(local(bias), x)
        # Rank 0 alone adds it, but its gradient is whole on each rank, and is not to be scaled.
        return bias if self.axis.rank == 0 else bias - bias.detach()

    def _row_norm(self: Any, weight: Tensor) -> Tensor:
        squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)
        return comm.all_reduce(squares, self.axis).sqrt()


class ReplicatedLoraLinear(ParallelLora, LoraLinear):
    """LoRA and DoRA on a linear with a whole weight.

    Where every rank computes alike (a classifier) nothing is partial. On local heads (a linear that
    a plan calls ``replicated_with_grad_allreduce``) the gradients are parts, as the base weight's.

    Backward: on local heads 1 all-reduce for each factor, else none
    """

    placements = (Replicate(), Replicate(), Replicate())

    def _delta(self: Any, adapter: str, x: Tensor) -> Tensor:
        A, B = (self._summed(local(p)) for p in self._factors(adapter))
        return F.linear(self._low_rank(adapter, x, A), B)

    def _summed(self: Any, parameter: Tensor) -> Tensor:
        partial = getattr(self.get_base_layer(), PARTIAL, False)
        return super()._summed(parameter) if partial else parameter
