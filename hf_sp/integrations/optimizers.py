"""Optimizers that cannot step on DTensors: a table of them, refused when they are made."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_sp.errors import ConfigError
from hf_sp.patching import Patch, Patches

_FUSED = "DTensor knows no sharded form of this fused kernel"
_RAW = "its kernels take whole tensors and not DTensors"
# Package, class (empty: all; subclasses too), option that has to be on for it, reason.
UNFIT = (
    ("torch.optim", "Adafactor", "", "it needs norms of whole rows and columns"),
    ("torch.optim", "LBFGS", "", "it flattens all of them into one vector"),
    ("torch.optim", "Rprop", "", "it writes through masks, which DTensor cannot shard"),
    ("torch.optim", "SGD", "fused", _FUSED),
    ("torch.optim", "Adagrad", "fused", _FUSED),
    ("transformers.optimization", "Adafactor", "", "its row and column means are plain tensors"),
    *((package, "", "", _RAW) for package in ("bitsandbytes", "apex", "deepspeed")),
)


PATCHES = Patches(lambda _: True)


@PATCHES.on(Optimizer, "add_param_group")
def refuse_unfit(original: Patch, self: Optimizer, param_group: dict[str, Any]) -> None:
    """They would raise in DTensor's dispatch at the first step, after a forward and a backward."""
    original(self, param_group)
    group, kind = self.param_groups[-1], type(self)
    if not any(isinstance(p, DTensor) for p in group["params"]):
        return
    kinds = [(f"{cls.__module__}.", cls.__name__) for cls in kind.__mro__]
    other = "AdamW, SGD, or another of docs/trainer.md; tp divides their state over the ranks"
    for package, name, option, reason in UNFIT:
        unfit = any(m.startswith(f"{package}.") and name in ("", k) for m, k in kinds)
        if unfit and (not option or group.get(option)):
            raise ConfigError(
                f"{f'{option}=True of ' if option else ''}{kind.__name__} cannot step on shards",
                where=f"{kind.__module__}.{kind.__qualname__}",
                rule=f"parameters of a parallelized model are DTensors; {reason}",
                remedy=f"leave {option}=True out" if option else other,
            )
