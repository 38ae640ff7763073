"""Server-sent events, and answers that end when their client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moetor.server.errors import ApiError

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed its connection."""


_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
quoted = json.encoder.encode_basestring
"""A text as JSON has it."""


def event(content: dict[str, Any]) -> bytes:
    """One event with `content` as its data."""
    return _event(_JSON(content))


def _event(text: str) -> bytes:
    # A lone surrogate, from a request's own fields, has no UTF-8.
    return f"data: {text}\n\n".encode(errors="replace")


class Chunks:
    """Makes the events of one answer, whose frame is the same in all.

    Args:
        frame: the fields beside `choices`.
        counted: whether each event says that usage comes later.
    """

    def __init__(self, frame: dict[str, Any], *, counted: bool) -> None:
        self._frame = frame
        self._head = _JSON(frame)[:-1] + ',"choices":['
        self._tail = '],"usage":null}' if counted else "]}"

    def choice(self, content: dict[str, Any] | str) -> bytes:
        """An event with one choice.

        Args:
            content: the choice, or already the JSON of it.
        """
        text = content if isinstance(content, str) else _JSON(content)
        return _event(self._head + text + self._tail)

    def usage(self, content: dict[str, Any]) -> bytes:
        """The event that counts the tokens."""
        return event({**self._frame, "choices": [], "usage": content})


class EventStream(Response):
    """Sends events as they are made; when the client is gone or reads nothing, they are closed.

    Args:
        events: without `[DONE]`, which follows the last one; none of an empty one is sent. An
            `ApiError` in it becomes an event with that error.
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
        self._sending_since: float | None = None
        self.init_headers({"Cache-Control": "no-cache", **(headers or {})})

    def init_headers(self, headers: Any = None) -> None:
        """Headers without a length, which is not known."""
        super().init_headers(headers)
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the whole stream."""
        tasks = [
            asyncio.create_task(self._write(send)),
            asyncio.create_task(_client_gone(receive)),
            asyncio.create_task(self._too_slow()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            await self._events.aclose()
            await self._close()
        error = results[0]
        if isinstance(error, Exception) and not isinstance(error, OSError):
            raise error

    async def _write(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        now = asyncio.get_running_loop().time
        body = "http.response.body"
        try:
            async for piece in self._events:
                if piece:
                    self._sending_since = now()
                    await send({"type": body, "body": piece, "more_body": True})
                    self._sending_since = None
        except ApiError as error:
            await send({"type": body, "body": event(error.body()), "more_body": True})
        await send({"type": body, "body": DONE, "more_body": False})

    async def _too_slow(self) -> None:
        """Ends when a piece has waited too long for the client to read."""
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._write_timeout / 4)
            since = self._sending_since
            if since is not None and now() - since >= self._write_timeout:
                return


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
