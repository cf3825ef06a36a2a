"""``PeftModel.save_pretrained`` around a parallelized model: called on all ranks, written by one.

PEFT (0.18 to 0.21) gathers DTensors inside ``get_peft_model_state_dict``, on whichever ranks call
it, so that rank 0 alone hangs there.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from hf_sp.checkpoint import meet
from hf_sp.integrations.patching import Patch, Patches
from hf_sp.state import parallel_state

PATCHES = Patches(lambda model: parallel_state(model) is not None)


@PATCHES.on(PeftModel, "save_pretrained")
def save_from_all_ranks(
    original: Patch,
    self: PeftModel,
    save_directory: str,
    safe_serialization: bool = True,
    selected_adapters: list[str] | None = None,
    save_embedding_layers: str | bool = "auto",
    is_main_process: bool = True,
    **kwargs: Any,
) -> Any:
    """Meet, then save; every rank gathers and the first of them writes.

    ``is_main_process`` is True by default, on every rank: all would write the same files.
    """
    state = parallel_state(self)
    assert state is not None
    meet(state.group, "save_pretrained")
    return original(
        self,
        save_directory,
        safe_serialization=safe_serialization,
        selected_adapters=selected_adapters,
        save_embedding_layers=save_embedding_layers,
        is_main_process=is_main_process and state.rank == 0,
        **kwargs,
    )
