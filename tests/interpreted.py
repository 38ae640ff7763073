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
