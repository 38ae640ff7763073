"""uvicorn's HTTP with bounds on what comes before a request's body."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 * 2**10


def bounded_protocol(timeout: float) -> type[asyncio.Protocol]:
    """A protocol that closes a connection whose request line and headers are too large or too slow.

    Args:
        timeout: seconds in which they must have arrived.
    """

    class BoundedProtocol(HttpToolsProtocol):
        _head_bytes = 0
        _in_head = False
        _alarm: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start_head()

        def data_received(self, data: bytes) -> None:
            if not self._in_head and self.cycle is not None and self.cycle.response_complete:
                self._start_head()
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

        def on_headers_complete(self) -> None:
            self._end_head()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_head()
            super().connection_lost(exc)

        def _start_head(self) -> None:
            self._in_head, self._head_bytes = True, 0
            self._alarm = self.loop.call_later(timeout, self._refuse, b"408 Request Timeout")

        def _end_head(self) -> None:
            self._in_head = False
            if self._alarm is not None:
                self._alarm.cancel()
                self._alarm = None

        def _refuse(self, status: bytes) -> None:
            self._end_head()
            if not self.transport.is_closing():
                head: Any = b"HTTP/1.1 " + status
                self.transport.write(head + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                self.transport.close()

    return BoundedProtocol
