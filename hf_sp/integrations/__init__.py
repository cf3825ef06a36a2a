"""Where Trainer, accelerate, PEFT and TRL meet hf_sp. The only importers of those packages."""

from torch import nn


def install(model: nn.Module) -> None:
    """What a model that has just been parallelized needs of the integrations."""
