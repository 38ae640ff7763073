"""What stands before the endpoints: keys, and the size of bodies."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moetor.server.errors import ApiError, error_body

# Without a key: whether the server lives, what it is, and the page, which asks for the key itself.
OPEN_PATHS = frozenset(("/", "/health", "/metrics", "/version"))


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


class BodyGuard:
    """Refuses bodies that are too large, before and while they are read.

    Args:
        app: what is guarded.
        most: bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

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
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
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
