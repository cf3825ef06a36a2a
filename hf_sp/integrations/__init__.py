"""What makes stock transformers, accelerate and torch's tools work with a parallelized model.

The only importers of those packages' training code. ``install`` is called at the end of
``parallelize``; every patch acts on parallelized models alone. ``private_names`` lists what is
private.
"""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from hf_sp.checkpoint.weights import install_load_hook
from hf_sp.comm.shard import draw_whole, laid_out_as
from hf_sp.patching import Patches
from hf_sp.state import parallel_state
from hf_sp.torch_private import allow_anomaly_mode, draw_by, read_whole_numbers, set_data_by


def install(model: nn.Module) -> None:
    """Make the packages around ``model`` treat it as what it is. Cheap and idempotent.

    Args:
        model: a parallelized model.
    """
    # Imported here: Trainer takes two seconds, which `import hf_sp` alone should not.
    from transformers import PreTrainedModel
    from transformers.distributed.configuration_utils import DistributedConfig

    from hf_sp.integrations import (
        accelerate_files,
        offload,
        optimizers,
        process_patches,
        saving,
        torch_checkpoint,
        torch_norm,
        trainer,
        trainer_files,
        trainer_ranks,
    )
    from hf_sp.integrations import accelerate_patches as accelerate

    modules = [accelerate, accelerate_files, optimizers, process_patches, saving]
    modules += [torch_checkpoint, torch_norm]
    modules += [trainer, trainer_files, trainer_ranks]
    if importlib.util.find_spec("peft") is not None:
        from hf_sp.adapters import peft_patches

        modules.append(peft_patches)
    tables = [x for module in modules for x in vars(module).values() if isinstance(x, Patches)]
    for patches in tables:
        patches.apply()
    state = parallel_state(model)
    assert state is not None
    if isinstance(model, PreTrainedModel):
        # The light mark, no more. With ``_tp_size`` Trainer would count tp ranks as processes. With
        # ``_device_mesh`` PEFT would shard adapters again. With
        # ``_is_distributed_loading_by_transformers`` Trainer would broadcast and average what is
        # not a DTensor, and refuse to save what can be resumed. Not written to config.json.
        model.config.distributed_config = DistributedConfig(tp_size=state.tp)
    if state.offload:
        offload.Offload(model, state).install()
    install_load_hook(model)
    allow_anomaly_mode()
    read_whole_numbers()
    set_data_by(laid_out_as)
    if state.mesh.device_type == "cpu":
        # On a GPU torch has one stream of random numbers for all parts.
        draw_by(draw_whole)


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters that cannot be sharded."""
    if hasattr(model, "peft_config"):
        from hf_sp.adapters import checks as peft_checks

        peft_checks.check_adapters(model)


def without_adapters(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """The model without its adapters, for as long as it is sharded."""
    if hasattr(model, "peft_config"):
        from hf_sp.adapters import adopt

        return adopt.without_adapters(model)
    return nullcontext(model)
