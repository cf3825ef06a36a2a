"""The loss's kernels compiled for sm_90, as tests/kernels/sm_90.py does; run in its own process."""

from __future__ import annotations

import json
import sys

import torch

from hf_sp.kernels import launch as dispatch
from hf_sp.kernels.cross_entropy_triton import launch_gradient, launch_statistics
from tests.kernels.sm_90 import POINTERS, compile_launch, resources

POINTERS.setdefault(torch.int64, "*i64")

# Qwen3's vocabulary over 8 ranks; a share that no vector divides.
LOGITS = ((18992, torch.bfloat16), (18992, torch.float32), (6283, torch.bfloat16))


def cases():
    """`(label, launcher, arguments, keywords)`: the launches worth a look."""
    for columns, dtype in LOGITS:
        logits, labels = torch.empty(64, columns, dtype=dtype), torch.empty(64).long()
        row = torch.empty(64)
        for cap in (0.0, 30.0):
            form = {"start": 0, "ignore_index": -100, "scale": 1.0, "softcap": cap}
            tag = f"{columns} {dtype} cap={cap:g}"
            yield f"statistics {tag}", launch_statistics, (logits, labels), form
            yield f"gradient {tag}", launch_gradient, (logits, logits, labels, *[row] * 3), form


def main():
    found, launched = {}, []
    dispatch.launch = lambda kernel, grid, *args, **kwargs: launched.append((kernel, args, kwargs))
    for label, launcher, arguments, keywords in cases():
        launcher(*arguments, **keywords)
        kernel, args, kwargs = launched.pop()
        found[label] = resources(compile_launch(kernel, args, kwargs))
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
