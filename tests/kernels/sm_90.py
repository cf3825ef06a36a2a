"""Compile the launches of the kernels for sm_90, without a GPU; print what they take, as JSON.

Run in a process of its own, without TRITON_INTERPRET. What is compiled is what the launchers hand
to `dispatch.launch`, with Triton's own specialisation of integers and addresses.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_sp.kernels import launch as dispatch
from hf_sp.kernels import norm_triton, swiglu_triton

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_launch(kernel, args, kwargs):
    """As a launch on a GPU would: 1 is a constant, multiples of 16 are known to be such."""
    kwargs = dict(kwargs)
    options = {"num_warps": kwargs.pop("num_warps"), **dispatch.OPTIONS}
    names = kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(zip(names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    for name, value in kwargs.items():
        signature[name], constants[name] = "constexpr", value
    source = ASTSource(kernel, {n: signature[n] for n in names}, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(compiled):
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "vector": len(re.findall(r"(?:ld|st)\.global[.\w:]*\.v4\.b32", ptx)),
        "narrow": len(re.findall(r"(?:ld|st)\.global[.\w:]*\.b(?:16|8) ", ptx)),
        "async": ptx.count("cp.async.cg") + ptx.count("cp.async.ca"),
    }


def cases():
    """`(label, call)`: the launches worth a look."""
    bf16 = torch.bfloat16
    for n in (128, 512, 896, 2048, 4096, 5120, 8192, 16384):
        heads = (2, 64, 8, n) if n == 128 else (2, 64, n)
        x, w = torch.empty(heads, dtype=bf16), torch.empty(n, dtype=bf16)
        yield (
            f"norm forward {n}",
            lambda x=x, w=w: norm_triton.rms_norm(x, w, 1e-6, 0.0, "llama"),
        )
        if n > 8192:
            continue
        rstd = torch.empty(heads[:-1])
        yield (
            f"norm backward {n}",
            lambda x=x, w=w, q=rstd: norm_triton.rms_norm_backward(x, x, q, w, 0.0, "llama"),
        )
    qkv = torch.empty(2, 64, 1536, dtype=bf16)
    q, w = qkv[..., :1024].unflatten(-1, (8, 128)), torch.empty(128, dtype=bf16)
    yield "q slice forward 128", lambda: norm_triton.rms_norm(q, w, 1e-6, 0.0, "llama")
    x, w32 = torch.empty(128, 4096), torch.empty(4096)
    yield "gemma forward 4096 fp32", lambda: norm_triton.rms_norm(x, w32, 1e-6, 1.0, "gemma")
    g = torch.empty(2, 64, 14336, dtype=bf16)
    yield "swiglu forward", lambda: swiglu_triton.swiglu(g, g)
    yield "swiglu backward", lambda: swiglu_triton.swiglu_backward(g, g, g, product=False)
    yield "swiglu backward+z", lambda: swiglu_triton.swiglu_backward(g, g, g, product=True)
    fused = torch.empty(2, 64, 2 * 14336, dtype=bf16)
    gate, up = fused.chunk(2, dim=-1)
    yield "swiglu halves forward", lambda: swiglu_triton.swiglu(gate, up)


def main():
    found = {}
    launched = []
    dispatch.launch = lambda kernel, grid, *args, **kwargs: launched.append((kernel, args, kwargs))
    for label, call in cases():
        call()
        kernel, args, kwargs = launched.pop()
        warps = kwargs["num_warps"]
        found[label] = {"warps": warps, **resources(compile_launch(kernel, args, kwargs))}
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
