"""The loss's kernels compiled for sm_90, as tests/kernels/sm_90.py does; run in its own process."""

from __future__ import annotations

import json
import sys

import torch

from hf_sp.kernels import launch as dispatch
from hf_sp.kernels.cross_entropy_steps import Combined, LossTerms
from hf_sp.kernels.cross_entropy_triton import launch_gradient, launch_statistics
from tests.kernels.sm_90 import POINTERS, compile_launch, resources

POINTERS.setdefault(torch.int64, "*i64")

# Qwen3's vocabulary over 8 ranks; a share that no vector divides.
LOGITS = ((18992, torch.bfloat16), (18992, torch.float32), (6283, torch.bfloat16))


def cases():
    """`(label, launcher, arguments)`: the launches worth a look."""
    for columns, dtype in LOGITS:
        logits, labels = torch.empty(64, columns, dtype=dtype), torch.empty(64).long()
        row = torch.empty(64)
        for cap in (0.0, 30.0):
            terms = LossTerms(columns, softcap=cap or None)
            tag = f"{columns} {dtype} cap={cap:g}"
            whole = Combined(row, row, row)
            yield f"statistics {tag}", launch_statistics, (logits, labels, terms)
            yield f"gradient {tag}", launch_gradient, (logits, logits, labels, whole, row, terms)


def main():
    found, launched = {}, []
    dispatch.launch = lambda kernel, grid, *args, **kwargs: launched.append((kernel, args, kwargs))
    for label, launcher, arguments in cases():
        launcher(*arguments)
        kernel, args, kwargs = launched.pop()
        found[label] = resources(compile_launch(kernel, args, kwargs))
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
