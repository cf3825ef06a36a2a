"""Triton's interpreter, repaired, and every private name of triton that tests of kernels use.

Owns running a kernel on the CPU, with three faults of the interpreter (triton 3.6 to 3.9) put
right, each held by test_interpreter.py. ``hf_sp.kernels.launch.interpreter = launch`` puts it in
place.

1. float32 to bfloat16 truncates; torch and the GPU round to nearest even.
2. In 3.6 with numpy 2.4, a loop bound known at run time only raises (triton PR 9172).
3. It runs only what was decorated while TRITON_INTERPRET=1 was set. Here it runs any kernel, and
   nothing is left behind for compiled kernels to trip on.

Not repaired: bfloat16 arithmetic without a cast to float32 is wrong in it. Must not know any
kernel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.language import core, math, standard

# Private: the interpreter has no public interface but the environment variable.
from triton.runtime import interpreter as _interpreter
from triton.runtime.jit import JITFunction


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
    """Run a kernel on CPU tensors.

    Args:
        kernel: a function decorated with ``triton.jit``, in whichever mode.
        grid: number of programs.
        args: the kernel's arguments.
        kwargs: its constexpr arguments and launch options.
    """
    _repair()
    function = _interpreted(kernel)
    # What triton imports at a first launch looks at the variable. On a GPU overflow and NaN are
    # values, not warnings.
    asked = mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"})
    with asked, _restored(kernel.fn.__globals__), np.errstate(all="ignore"):
        function[grid](*args, **kwargs)


@cache
def _interpreted(function: Any) -> Any:
    if isinstance(function, JITFunction):
        return _interpreter.InterpretedFunction(function.fn)
    return function


@contextmanager
def _restored(kernel_globals: dict[str, Any]) -> Iterator[None]:
    """Interpret the functions that the kernel calls, too; put all back at the end.

    Triton's own library (``tl.sum``) and a kernel's helpers were decorated at their import, maybe
    for the compiler. And a call of an interpreted function patches the language without undoing it.
    """
    modules, classes = (tl, core, math, standard), (tl.tensor, tl.dtype, tl.condition)
    before = [(space, dict(vars(space))) for space in (*modules, *classes)]
    helpers = {k: v for k, v in kernel_globals.items() if isinstance(v, JITFunction)}
    try:
        for space, names in before[: len(modules)]:
            for name, value in names.items():
                if isinstance(value, JITFunction):
                    setattr(space, name, _interpreted(value))
        kernel_globals.update({name: _interpreted(value) for name, value in helpers.items()})
        yield
    finally:
        kernel_globals.update(helpers)
        for space, names in before:
            for name, value in list(vars(space).items()):
                if name in names and value is not names[name]:
                    setattr(space, name, names[name])
                elif name not in names and space in classes:
                    # In modules new names stay: the interpreted functions, kept, refer to them.
                    delattr(space, name)


@cache
def _repair() -> None:
    """Put faults 1 and 2 right, once per process."""
    builder = _interpreter.InterpreterBuilder
    plain_cast, plain_convert = builder.cast_impl, builder.create_fp_to_fp
    patch_tensor = _interpreter._patch_lang_tensor

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        data = _bfloat16_cast(src.data, src.dtype.scalar, dst_type.scalar)
        if data is None:
            return plain_cast(self, src, dst_type)
        return _interpreter.TensorHandle(data, dst_type.scalar)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        data = _bfloat16_cast(src.data, src.dtype.scalar, dst_type.scalar)
        if data is None:
            return plain_convert(self, src, dst_type, rounding_mode)
        return _interpreter.TensorHandle(data, dst_type.scalar)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    _interpreter._patch_lang_tensor = patch_lang_tensor


def _bfloat16_cast(data: Any, src: Any, dst: Any) -> Any | None:
    """The interpreter keeps bfloat16 as uint16: cast between that and float32 as torch does."""
    if src == tl.float32 and dst == tl.bfloat16:
        rounded = torch.from_numpy(np.array(data, dtype=np.float32)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    if src == tl.bfloat16 and dst == tl.float32:
        return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)
    return None
