"""Test processes with TRITON_INTERPRET=1: Triton's kernels on the CPU.

The interpreter is chosen by that variable when a kernel is defined, so it takes a process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed (pip install triton)",
)


def run_interpreted(script: Path, *arguments: str) -> None:
    """Runs a test file as a script under the interpreter; fails with what it printed."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def allow_loop_bounds() -> None:
    """Lets a loop's bounds be computed in the kernel.

    Triton 3.6's interpreter turns them into Python integers in a way that NumPy 2.4 refuses.
    """
    from triton.runtime import interpreter

    before = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        before(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


def allow_small_floats() -> None:
    """Lets kernels calculate with bfloat16 and round to it and to float8 e4m3.

    Triton 3.6's interpreter loses the carry when it rounds to these, adds and multiplies the bit
    patterns of bfloat16, and widens its subnormal numbers wrongly.
    """
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    convert, dot, binary_op = interpreter._convert_float, builder.create_dot, builder.binary_op
    rounded = {tl.float8e4nv: torch.float8_e4m3fn, tl.bfloat16: torch.bfloat16}
    bits = {tl.float8e4nv: torch.uint8, tl.bfloat16: torch.uint16}

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target in rounded:
            numbers = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return numbers.to(rounded[target]).view(bits[target]).numpy()
        if source == tl.bfloat16 and target == tl.float32:
            return data.astype(np.uint32) << 16
        return convert(data, source, target, rounding)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(wide.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def create_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary_op(self, left, right, op)
        wide = binary_op(self, widened(left), widened(right), op)
        if wide.data.dtype != np.float32:
            return wide
        narrow = convert_float(wide.data, tl.float32, tl.bfloat16, None).reshape(wide.data.shape)
        return interpreter.TensorHandle(narrow, tl.bfloat16)

    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
    builder.binary_op = create_binary
