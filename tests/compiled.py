"""Triton kernels compiled for GPUs that are not here.

Launches on meta tensors go the kernels' own way through plans, descriptors and arguments, and end
as compilations for the asked compute capability, which need no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moetor.kernels.triton.choose import Device


@dataclass(frozen=True)
class Compiled:
    """One compilation.

    Attributes:
        shared: bytes of shared memory of a program.
        ptx: its code.
    """

    name: str
    shared: int
    ptx: str


class _Driver:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


@contextmanager
def compiling_for(device: Device) -> Iterator[list[Compiled]]:
    """Launches inside are compiled, not run; the list gets each of them."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made: list[Compiled] = []
    run, before = JITFunction.run, driver._active

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        made.append(Compiled(self.fn.__name__, kernel.metadata.shared, kernel.asm["ptx"]))
        return kernel

    major, minor = device.capability
    JITFunction.run = compile_only
    driver.set_active(_Driver(10 * major + minor))
    try:
        yield made
    finally:
        driver._active = before
        JITFunction.run = run
