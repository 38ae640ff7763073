"""When an engine last gave a sign of life, in memory that its process shares with its owner's.

A message would have to be sent by the engine and read by an event loop, and whoever asks for health
must not depend on either.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from typing import Any

INTERVAL_S = 0.25
"""Between two beats of an engine that has nothing to do, at most."""


class Heartbeat:
    """A time of the clock that all processes of a machine share; 0 before the first beat.

    Args:
        descriptor: of the memory of another one, which may be another process's; None makes its
            own.

    Attributes:
        descriptor: of the memory.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = _memory() if descriptor is None else descriptor
        os.ftruncate(self.descriptor, 8)
        self._seconds: Any = memoryview(mmap.mmap(self.descriptor, 8)).cast("d")

    def beat(self) -> None:
        """Notes that there is life."""
        self._seconds[0] = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the last beat."""
        return time.monotonic() - float(self._seconds[0])

    def close(self) -> None:
        """Closes the descriptor; the memory stays."""
        os.close(self.descriptor)


def _memory() -> int:
    if hasattr(os, "memfd_create"):  # Linux, where /tmp may not be writable
        return os.memfd_create("moetor-heartbeat")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
