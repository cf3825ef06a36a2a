"""Optimizers that cannot step on sharded parameters: refused when they are made.

torch.optim works on DTensors where each of its operations does; data here says which do not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hf_sp.errors import ConfigError
from hf_sp.patching import Patch, Patches


class Unfit(NamedTuple):
    """Optimizers that fail on shards, and why; subclasses do too.

    ``name`` is a class in ``package`` (empty: all of them), ``option`` what has to be on for it.
    """

    package: str
    name: str
    reason: str
    option: str = ""


_FUSED = "DTensor knows no sharded form of this fused kernel"
_RAW = "its kernels take whole tensors and not DTensors"
UNFIT = (
    Unfit("torch.optim", "Adafactor", "its row and column norms are of one rank's shard"),
    Unfit("torch.optim", "LBFGS", "it flattens all of them into one vector"),
    Unfit("torch.optim", "Rprop", "it writes through masks, which DTensor cannot shard"),
    Unfit("torch.optim", "SGD", _FUSED, "fused"),
    Unfit("torch.optim", "Adagrad", _FUSED, "fused"),
    Unfit("transformers.optimization", "Adafactor", "its row and column means are plain tensors"),
    Unfit("bitsandbytes", "", _RAW),
    Unfit("apex", "", _RAW),
    Unfit("deepspeed", "", _RAW),
)


def _unfit(optimizer: Any) -> list[Unfit]:
    kinds = [(f"{cls.__module__}.", cls.__name__) for cls in type(optimizer).__mro__]
    return [
        row
        for row in UNFIT
        if any(m.startswith(f"{row.package}.") and row.name in ("", n) for m, n in kinds)
    ]


PATCHES = Patches(lambda optimizer: bool(_unfit(optimizer)))
"""Patches of optimizers of the table, which look whether they are given DTensors."""


@PATCHES.on(Optimizer, "add_param_group")
def refuse_unfit(original: Patch, self: Optimizer, param_group: dict[str, Any]) -> None:
    """They would raise in DTensor's dispatch at the first step, after a forward and a backward."""
    original(self, param_group)
    group = self.param_groups[-1]
    rows = [row for row in _unfit(self) if not row.option or group.get(row.option)]
    if not rows or not any(isinstance(p, DTensor) for p in group["params"]):
        return
    row, kind = rows[0], type(self)
    what = f"{row.option}=True of {kind.__name__}" if row.option else kind.__name__
    other = "AdamW (fused, foreach or neither), Adam, NAdam, RAdam, Adamax, Adagrad, Adadelta,\n"
    other += "ASGD, RMSprop, SGD or Muon of torch.optim; tp divides their state over the ranks"
    raise ConfigError(
        f"{what} cannot step on sharded parameters",
        where=f"{kind.__module__}.{kind.__qualname__}",
        rule=f"parameters of a parallelized model are DTensors; {row.reason}",
        remedy=f"leave {row.option}=True out" if row.option else other,
    )
