"""A small model with its tokenizer and a few rows of data, in a folder: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """Folder with ``model`` (and tokenizer), ``rows.jsonl`` and ``pairs.jsonl``."""
    folder = tmp_path_factory.mktemp("local")
    text = (ROOT / "LICENSE").read_text()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text.splitlines(keepends=True), 301, special_tokens=["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 30]
    rows = [{"text": line} for line in lines[:24]]
    pairs = [
        {"prompt": a, "completion": f" {b}"} for a, b in zip(lines[:12], lines[12:24], strict=True)
    ]
    for name, data in {"rows": rows, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, data)))
    return folder
