"""Server-sent events, and answers that end when their client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moetor.server.errors import ApiError

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed its connection."""


def event(content: dict[str, Any]) -> bytes:
    """One event with `content` as its data."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate, from a request's own fields, has no UTF-8.
    return f"data: {text}\n\n".encode(errors="replace")


class EventStream(Response):
    """Sends events as they are made; when the client is gone or reads nothing, they are closed.

    Args:
        events: without `[DONE]`, which follows the last one. An `ApiError` in it becomes an event
            with that error.
        close: called at the end, however it comes.
        write_timeout: seconds that a client may take to read.
        headers: further ones.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        *,
        close: Callable[[], Awaitable[None]],
        write_timeout: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events, self._close, self._write_timeout = events, close, write_timeout
        self.init_headers({"Cache-Control": "no-cache", **(headers or {})})

    def init_headers(self, headers: Any = None) -> None:
        """Headers without a length, which is not known."""
        super().init_headers(headers)
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the whole stream."""
        writing = asyncio.create_task(self._write(send))
        leaving = asyncio.create_task(_client_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, leaving):
                task.cancel()
            results = await asyncio.gather(writing, leaving, return_exceptions=True)
            await self._events.aclose()
            await self._close()
        error = results[0]
        if isinstance(error, Exception) and not isinstance(error, TimeoutError | OSError):
            raise error

    async def _write(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        async for piece in self._pieces():
            async with asyncio.timeout(self._write_timeout):
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._events:
                yield piece
        except ApiError as error:
            yield event(error.body())
        yield DONE


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client is gone.

    Raises:
        ClientGoneError: it is.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_client_gone(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
