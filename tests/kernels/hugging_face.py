"""transformers' own norms, by casting mode: what bits are compared with."""

from __future__ import annotations

import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

NORMS = {
    "llama": ("llama", 0.0, LlamaRMSNorm),
    "qwen3": ("llama", 0.0, Qwen3RMSNorm),
    "gemma": ("gemma", 1.0, Gemma3RMSNorm),
    "gpt_oss": ("gpt_oss", 0.0, GptOssRMSNorm),
    "olmo2": ("gpt_oss", 0.0, Olmo2RMSNorm),
}


def norm(name, weight, eps=1e-6):
    """`(module with this weight, arguments that should give the same)`."""
    casting, offset, cls = NORMS[name]
    module = cls(weight.shape[0], eps=eps)
    module.weight = torch.nn.Parameter(weight)
    return module, {"casting": casting, "offset": offset}
