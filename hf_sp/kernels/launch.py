"""Which tensors the Triton kernels can take, and how they are launched. The rest goes to torch.

Owns the decision, the late import of the kernel modules, and the launch. Must not know what the
kernels compute. Importing it imports no triton.
"""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import hf_sp.kernels.table as table

# How often each kernel ran in this process: shows that it was not torch that answered.
launches: Counter[str] = Counter()

# Said outright: the default changes in triton 3.10, and 3.9 warns of that when it compiles.
# In the forwards only the sum of squares has something to fuse.
OPTIONS = {"enable_fp_fusion": True}

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


def _interpret(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    kernel[grid](*args, **kwargs)


# How kernels run on CPU tensors: in Triton's interpreter, or not at all. Read once, as Triton does:
# its decorators look at the variable at import. Tests put a mended interpreter here.
interpreter: Callable[..., None] | None = (
    _interpret if os.environ.get("TRITON_INTERPRET") == "1" else None
)


def usable(x: Tensor, *others: Tensor | None) -> bool:
    """Whether kernels can take all these tensors.

    They can if triton is there; all are plain tensors (no DTensor, no FakeTensor) in float32,
    bfloat16 or float16 on one CUDA device (compute capability 8.0 or newer), or on the CPU where
    Triton's interpreter is asked for; none is empty; and torch.compile is not tracing.
    """
    if not (x.is_cuda or interpreter) or torch.compiler.is_compiling():
        return False
    device = x.device
    for one in (x, *others):
        if one is not None and (
            type(one) not in _PLAIN
            or one.dtype not in _DTYPES
            or one.device != device
            or one.numel() == 0
            or one.dim() == 0
        ):
            return False
    known = _cuda_usable(device.index) if x.is_cuda else device.type == "cpu"
    return known and _has_triton()


def norm_kernels(x: Tensor, *others: Tensor | None, backward: bool = False) -> Any | None:
    """The module with the norm's launchers, or None where torch must do it."""
    limit = table.MAX_BACKWARD if backward else table.MAX_FORWARD
    return _module("norm_triton") if usable(x, *others) and x.shape[-1] <= limit else None


def swiglu_kernels(activation: str, gate: Tensor, *others: Tensor) -> Any | None:
    """The module with the gated products' launchers, or None where torch must do it."""
    if (
        activation not in ("silu", "gelu_tanh")
        or not usable(gate, *others)
        or any(x.dtype != gate.dtype for x in others)
    ):
        return None
    return _module("swiglu_triton")


def cross_entropy_kernels(logits: Tensor) -> Any | None:
    """The module with the loss's launchers, or None where torch must do it."""
    return _module("cross_entropy_triton") if usable(logits) else None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Launch a ``triton.jit`` function on the device of its first argument, a tensor."""
    launches[kernel.fn.__name__] += 1
    device = args[0].get_device()
    if device < 0:
        assert interpreter is not None
        interpreter(kernel, grid, *args, **kwargs)
    elif device == torch.cuda.current_device():
        kernel[grid](*args, **OPTIONS, **kwargs)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **OPTIONS, **kwargs)


@cache
def programs(device: torch.device, per_sm: int) -> int:
    """How many programs a persistent kernel runs: fixed per kind of device, so sums are too."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count * per_sm
    # In the interpreter few, so that each one's loop really runs.
    return 2


@cache
def _module(name: str) -> Any:
    return importlib.import_module(f"hf_sp.kernels.{name}")


@cache
def _has_triton() -> bool:
    # Found is not enough: a triton that does not fit this Python or libc fails at import.
    try:
        importlib.import_module("triton.language")
    except ImportError:
        return False
    return True


@cache
def _cuda_usable(index: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= (8, 0)
