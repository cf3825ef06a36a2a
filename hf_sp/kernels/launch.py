"""Which tensors the Triton kernels can take, and how they are launched. The rest goes to torch.

Owns the decision, the late import of the kernel modules, and the launch: device guard, interpreter,
count. Must not know what the kernels compute. Importing it imports no triton.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hf_sp.kernels import table

# How often each kernel ran in this process: lets a test see that it was not torch that answered.
launches: Counter[str] = Counter()

# Said outright: the default changes in triton 3.10, and 3.9 warns of that when it compiles.
# In the forwards only the sum of squares has something to fuse.
OPTIONS = {"enable_fp_fusion": True}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


def usable(*tensors: Tensor | None) -> bool:
    """Whether kernels can take all these tensors.

    They can if triton is there; all are plain tensors (no DTensor, no FakeTensor) in float32,
    bfloat16 or float16 on one CUDA device (compute capability 8.0 or newer), or on the CPU where
    TRITON_INTERPRET=1 is set at this moment; none is empty; and torch.compile is not tracing.
    """
    if torch.compiler.is_compiling():
        return False
    device = None
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN or x.dtype not in _DTYPES or x.numel() == 0 or x.dim() == 0:
            return False
        if device is None:
            device = x.device
        elif x.device != device:
            return False
    if device is None:
        return False
    if device.type == "cuda":
        return _cuda_usable(device.index)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and _has_triton()


def norm_kernels(
    x: Tensor, weight: Tensor | None, *others: Tensor | None, backward: bool = False
) -> Any | None:
    """The module with the norm's launchers, or None where torch must do it.

    Args:
        x: the rows.
        weight: ``[N]`` or None.
        others: further tensors shaped like x.
        backward: whether the backward's limit on N counts.
    """
    limit = table.MAX_BACKWARD if backward else table.MAX_FORWARD
    if x.dim() and x.shape[-1] <= limit and usable(x, weight, *others):
        return _module("norm_triton")
    return None


def swiglu_kernels(gate: Tensor, *others: Tensor) -> Any | None:
    """The module with SwiGLU's launchers, or None where torch must do it.

    Args:
        gate: the gate projection.
        others: further tensors, which must have its dtype.
    """
    if all(x.dtype == gate.dtype for x in others) and usable(gate, *others):
        return _module("swiglu_triton")
    return None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launch a kernel on the device of its first argument.

    Args:
        kernel: a function decorated with ``triton.jit``.
        grid: number of programs.
        args: the kernel's arguments, a tensor first.
        kwargs: constexpr arguments and launch options.
    """
    launches[kernel.fn.__name__] += 1
    if args[0].is_cuda:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **OPTIONS, **kwargs)
    else:
        importlib.import_module("hf_sp.kernels.interpreter").launch(kernel, grid, *args, **kwargs)


def programs(device: torch.device, per_sm: int) -> int:
    """How many programs a persistent kernel runs: fixed per kind of device, so sums are too."""
    if device.type == "cuda":
        return _sm_count(device.index) * per_sm
    # In the interpreter few, so that each one's loop really runs.
    return 2


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"hf_sp.kernels.{name}")


@cache
def _has_triton() -> bool:
    # Found is not enough: a triton that does not fit this Python or libc fails at import.
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        importlib.import_module("triton.language")
    except ImportError:
        return False
    return True


@cache
def _cuda_usable(index: int) -> bool:
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return False
    return _has_triton()


@cache
def _sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
