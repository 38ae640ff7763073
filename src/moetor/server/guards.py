"""What stands before the endpoints: keys, rates, the size of bodies."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moetor.server.errors import ApiError, error_body

# Without a key: whether the server lives, what it is, and the page, which asks for the key itself.
OPEN_PATHS = frozenset(("/", "/health", "/metrics", "/version"))
_MOST_CLIENTS = 10_000


class KeyGuard:
    """Lets requests with one of the keys pass, and those for open paths.

    Args:
        app: what is guarded.
        keys: any of them will do.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        # Digests have one length, so that comparing tells nothing about a key's.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or answers 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._known(scope):
            await self._app(scope, receive, send)
            return
        body = error_body(
            401,
            "this server needs its API key: send the header Authorization: Bearer KEY",
            code="invalid_api_key",
        )
        answer = JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        # All are compared, so that the time tells nothing about which one it was.
        same = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(same)


class RateGuard:
    """Bounds how often one client asks: a bucket of one minute's requests, filled steadily.

    Args:
        app: what is guarded.
        per_minute: requests of a client.
    """

    def __init__(self, app: ASGIApp, per_minute: int) -> None:
        self._app, self._most = app, per_minute
        self._buckets: dict[str, tuple[float, float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or answers 429."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        wait = self._take(self._client(scope), time.monotonic())
        if not wait:
            await self._app(scope, receive, send)
            return
        text = f"more than {self._most} requests a minute; try again in {wait:.0f} seconds"
        body = error_body(429, text, code="rate_limit_exceeded")
        answer = JSONResponse(body, 429, headers={"Retry-After": f"{wait:.0f}"})
        await answer(scope, receive, send)

    @staticmethod
    def _client(scope: Scope) -> str:
        key = Headers(scope=scope).get("authorization", "")
        # A digest, so that no key is kept.
        return hashlib.sha256(key.encode()).hexdigest() if key else (scope["client"] or [""])[0]

    def _take(self, client: str, now: float) -> int:
        """Takes one request from the client's bucket; seconds to wait where it is empty."""
        if len(self._buckets) > _MOST_CLIENTS:
            self._buckets = {c: b for c, b in self._buckets.items() if now - b[1] < 60}
        left, then = self._buckets.get(client, (float(self._most), now))
        left = min(self._most, left + (now - then) * self._most / 60)
        if left < 1:
            self._buckets[client] = left, now
            return math.ceil((1 - left) * 60 / self._most)
        self._buckets[client] = left - 1, now
        return 0


class BodyGuard:
    """Refuses bodies that are too large, before and while they are read.

    Args:
        app: what is guarded.
        most: bytes.
        timeout: seconds in which a body must have arrived.
    """

    def __init__(self, app: ASGIApp, most: int, timeout: float) -> None:
        self._app, self._most, self._timeout = app, most, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes on, or answers 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = Headers(scope=scope).get("content-length", "0")
        if not told.isdecimal() or int(told[:20]) > self._most:
            error = self._refusal()
            answer = JSONResponse(error.body(), error.status_code, headers={"Connection": "close"})
            await answer(scope, receive, send)
            return
        taken, reading = 0, True
        end = asyncio.get_running_loop().time() + self._timeout

        async def counted() -> Message:
            nonlocal taken, reading
            if not reading:  # what comes now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout_at(end):
                    message = await receive()
            except TimeoutError as error:
                raise ApiError(408, "the request took too long to arrive") from error
            reading = bool(message.get("more_body"))
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise self._refusal()
            return message

        await self._app(scope, counted, send)

    def _refusal(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than the {self._most} bytes that this server takes; send less, or "
            "start it with a larger --max-body-mib",
            code="request_too_large",
            headers={"Connection": "close"},
        )
