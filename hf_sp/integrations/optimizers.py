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
    ("galore_torch", "GaLoreAdafactor", "", "its row and column means are plain tensors"),
    ("apollo_torch", "", "", "its random projections are plain tensors"),
    ("lomo_optim", "", "", "it steps inside of backward, on gradients that it sums over all ranks"),
    ("prodigyopt", "", "", "it flattens and slices them, which DTensor cannot shard"),
    *((package, "", "", _RAW) for package in ("bitsandbytes", "apex", "deepspeed", "optimi")),
)
RIGHT = (
    *("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad"),
    *("grokadamw", "schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"),
    "galore_adamw",
)
"""Trainer's names of optimizers that have been compared with one process."""


def check_name(name: Any) -> None:
    """Refuse a Trainer's optimizer that is not known to be right on shards.

    Raises:
        ConfigError: what the name stands for need not be installed.
    """
    name = getattr(name, "value", name)
    if name not in RIGHT:
        raise ConfigError(
            f"optim={name!r} is not known to be right on shards",
            where="TrainingArguments",
            rule="parameters of a parallelized model are DTensors, on which another package's "
            "optimizer may fail or do something else",
            legal=", ".join(RIGHT),
            remedy="one of your own, after comparing some steps with one process: "
            "Trainer(optimizers=...)",
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
