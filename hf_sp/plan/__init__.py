"""From a Hugging Face model and its ``tp_plan`` strings to a parallel plan, as data."""

from hf_sp.plan.derive import derive_plan
from hf_sp.plan.schema import Block, Experts, Leaf, Plan

__all__ = ["Block", "Experts", "Leaf", "Plan", "derive_plan"]
