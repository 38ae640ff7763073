"""Triton's interpreter under NumPy 2.4 and later, for test processes with TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any


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
