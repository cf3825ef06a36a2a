"""What makes stock transformers and accelerate work with a parallelized model.

The only importers of those packages' training code. ``install`` is called at the end of
``parallelize``; every patch acts on parallelized models alone. ``names`` lists what is private.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from hf_sp.checkpoint.weights import install_load_hook
from hf_sp.state import parallel_state


def install(model: nn.Module) -> None:
    """Make the packages around ``model`` treat it as what it is. Cheap and idempotent.

    Args:
        model: a parallelized model.
    """
    # Imported here: Trainer takes two seconds, which `import hf_sp` alone should not.
    from hf_sp.integrations import (
        accelerate_mesh,
        accelerate_patches,
        mark,
        saving,
        trainer,
        trainer_files,
    )

    saving.PATCHES.apply()
    saving.FILE_PATCHES.apply()
    accelerate_patches.PATCHES.apply()
    accelerate_patches.STATE_PATCHES.apply()
    for patches in (trainer.PATCHES, trainer.ALL_PATCHES, trainer_files.PATCHES):
        patches.apply()
    state = parallel_state(model)
    assert state is not None
    mark.mark_tensor_parallel(model, state.tp)
    accelerate_mesh.register_parallel_model(model)
    install_load_hook(model)
    if has_peft():
        from hf_sp.adapters import peft_patches

        peft_patches.LAYER_PATCHES.apply()
        peft_patches.PATCHES.apply()


def has_peft() -> bool:
    """Whether PEFT is installed."""
    return importlib.util.find_spec("peft") is not None


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters that cannot be sharded."""
    if hasattr(model, "peft_config") and has_peft():
        from hf_sp.adapters import checks as peft_checks

        peft_checks.check_adapters(model)


def without_adapters(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """The model without its adapters, for as long as it is sharded."""
    if hasattr(model, "peft_config") and has_peft():
        from hf_sp.adapters import adopt

        return adopt.without_adapters(model)
    return _itself(model)


@contextmanager
def _itself(model: nn.Module) -> Iterator[nn.Module]:
    yield model
