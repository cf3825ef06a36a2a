"""Sizes of small models: plain data, which the process without hf_sp reads too."""

from __future__ import annotations

from typing import Any

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def sizes(**others: Any) -> dict[str, Any]:
    """Arguments of a configuration: these, but for others."""
    return {**SMALL, **others}
