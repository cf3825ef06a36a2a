"""The light mark: what tells transformers, accelerate and PEFT that a model is tensor parallel.

``_tp_size`` and ``config.distributed_config``, no more. transformers' ``_device_mesh`` stays None
(PEFT would shard adapters again) and ``_is_distributed_loading_by_transformers`` stays False
(Trainer would broadcast and average what is not a DTensor, and refuse to save what can be resumed).
The config's entry is left out of ``config.json`` by transformers.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig


def mark_tensor_parallel(model: nn.Module, tp: int) -> None:
    """Mark a transformers model; any other needs no mark. Can be called again."""
    if isinstance(model, PreTrainedModel):
        model._tp_size = tp  # type: ignore[assignment]
        model.config.distributed_config = DistributedConfig(tp_size=tp)
