"""The public place of ``save_optimizer`` and ``load_optimizer``."""

from hf_sp.checkpoint.optimizer import load_optimizer, save_optimizer

__all__ = ["load_optimizer", "save_optimizer"]
