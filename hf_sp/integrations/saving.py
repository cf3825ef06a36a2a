"""``PreTrainedModel``'s own methods on a parallelized model: what is saved, what is refused.

``save_pretrained`` is called on all ranks and written by one.

transformers' own gather for native TP (5.17 to 5.24, ``gather_state_dict_for_save``) keeps a CPU
copy of the whole model on every rank, gathers nothing at tp=1, and gathers by each rank's own list
of names, which differ when adapters are loaded in place (rank 0 has the adapter's alone: a hang).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_sp.checkpoint.weights import gather_state_dict, meet
from hf_sp.errors import ConfigError
from hf_sp.patching import Patch, Patches
from hf_sp.state import parallel_state

PATCHES = Patches(lambda model: parallel_state(model) is not None)


@PATCHES.on(PreTrainedModel, "save_pretrained")
def save_whole_tensors(
    original: Patch,
    self: PreTrainedModel,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Gather first, one tensor at a time and for the writing rank alone; then save plain tensors.

    transformers' own gather then finds no DTensor, and its barrier at the end holds all ranks.
    """
    if kwargs.get("distributed_checkpoint"):
        raise ConfigError(
            "save_pretrained(distributed_checkpoint=True) is not for a parallelized model",
            rule="transformers writes it for its own FSDP2 models only",
            remedy="leave it out: a plain checkpoint is written, one tensor gathered at a time",
        )
    state = parallel_state(self)
    assert state is not None
    meet(state.all_ranks, "save_pretrained")
    writes = self.should_save_on_this_rank(is_main_process)
    whole = gather_state_dict(self, state_dict, keep=writes)
    return original(
        self, save_directory, is_main_process=is_main_process, state_dict=whole, **kwargs
    )


@PATCHES.on(PreTrainedModel, "resize_token_embeddings")
def refuse_resize(original: Patch, self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Transformers 5.17 to 5.24 copies rows of whole embeddings; of shards it fails half done."""
    if not args and all(value is None for value in kwargs.values()):
        return original(self, *args, **kwargs)  # asks for the embedding only
    raise ConfigError(
        "the vocabulary of a parallelized model cannot be resized",
        where=f"{type(self).__name__}.resize_token_embeddings",
        rule="each rank holds a range of the vocabulary's rows",
        remedy="resize the embeddings before parallelize",
    )
