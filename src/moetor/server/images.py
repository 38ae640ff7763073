"""Pictures of messages: decoded from `data:` URLs, or fetched from the hosts that were named."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from moetor.server.errors import refusal

if TYPE_CHECKING:
    import aiohttp

MAX_IMAGES = 32
MAX_BYTES = 16 * 2**20
MAX_PIXELS = 2**25
FETCH_S = 10.0
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_PORTS = {"http": 80, "https": 443}


def is_public(address: str) -> bool:
    """Whether an address is somebody's on the internet: not private, loopback, link-local,
    multicast or reserved, nor an IPv4 address of those kinds inside an IPv6 one.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if inner or found in ipaddress.ip_network("64:ff9b::/96"):
            return False
    return found.is_global and not found.is_multicast


class ImageLoader:
    """Makes images of Pillow of the URLs in messages.

    Args:
        hosts: that may be fetched from, each as `host` (the usual ports) or `host:port`.
        resolve: finds a host's addresses.
        allowed: whether an address may be connected to.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        resolve: Callable[[str, int], Any] | None = None,
        allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._resolve, self._allowed = resolve or _addresses, allowed

    async def load(self, urls: Sequence[str]) -> list[Any]:
        """The pictures, in RGB.

        Raises:
            ApiError: status 400: one cannot be had, is too large, or is no picture.
        """
        if len(urls) > MAX_IMAGES:
            raise refusal(f"{len(urls)} pictures; at most {MAX_IMAGES} are taken", "messages")
        found = [await self._bytes(url) for url in urls]
        return [await asyncio.to_thread(_picture, data) for data in found]

    async def _bytes(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return _data(url)
        try:
            parts = urlsplit(url)
            port = parts.port or _PORTS.get(parts.scheme)
        except ValueError as error:
            raise refusal("image_url: this is not a URL", "messages") from error
        host = (parts.hostname or "").lower()
        if port is None or not host:
            raise refusal("image_url: only data:, https: and http: URLs are taken", "messages")
        named = f"{host}:{port}" in self._hosts
        if not named and (host not in self._hosts or port not in _PORTS.values()):
            raise refusal(
                f"image_url: pictures are not fetched from {host[:100]}:{port}; send a data: URL, "
                "or start the server with --allow-image-host",
                "messages",
            )
        if parts.username is not None or parts.password is not None:
            raise refusal("image_url: a URL with a user or a password is not fetched", "messages")
        return await self._fetch(url, parts, port)

    async def _fetch(self, url: str, parts: SplitResult, port: int) -> bytes:
        import aiohttp

        host = str(parts.hostname)
        timeout = aiohttp.ClientTimeout(total=FETCH_S)
        try:
            addresses = await asyncio.wait_for(self._resolve(host, port), FETCH_S)
            # One that may not be connected to condemns the host: it is not what was meant.
            if not addresses or not all(map(self._allowed, addresses)):
                raise refusal(
                    f"image_url: {host[:100]} has an address that is not public", "messages"
                )
            # The name is not looked up again: what was checked is what is connected to.
            connector = aiohttp.TCPConnector(resolver=_fixed(addresses[0]), force_close=True)
            async with (
                aiohttp.ClientSession(
                    connector=connector, timeout=timeout, trust_env=False, auto_decompress=False
                ) as session,
                session.get(url, allow_redirects=False) as answer,
            ):
                if answer.status != 200:
                    raise refusal(
                        f"image_url: {host[:100]} answers with status {answer.status}, and "
                        "redirects are not followed",
                        "messages",
                    )
                data = bytearray()
                async for piece in answer.content.iter_chunked(2**16):
                    data += piece
                    _check_size(len(data))
                return bytes(data)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = "it took too long" if isinstance(error, TimeoutError) else type(error).__name__
            raise refusal(
                f"image_url: {host[:100]} cannot be fetched from: {reason}", "messages"
            ) from error


async def _addresses(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(one[4][0]) for one in found]


def _fixed(address: str) -> aiohttp.abc.AbstractResolver:
    """A resolver that knows one address."""
    from aiohttp.abc import AbstractResolver, ResolveResult

    family = socket.AF_INET6 if ":" in address else socket.AF_INET

    class Fixed(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = family
        ) -> list[ResolveResult]:
            return [
                ResolveResult(
                    hostname=host,
                    host=address,
                    port=port,
                    family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                    proto=0,
                    flags=socket.AI_NUMERICHOST,
                )
            ]

        async def close(self) -> None:
            return None

    return Fixed()


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise refusal(f"image_url: a picture has more than {MAX_BYTES >> 20} MiB", "messages")


def _data(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise refusal("image_url: a data: URL must be data:image/...;base64,...", "messages")
    _check_size(len(body) * 3 // 4)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise refusal("image_url: the data: URL is not valid base64", "messages") from error


def _picture(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise refusal(
                    f"image_url: a picture of {width} x {height} pixels; at most {MAX_PIXELS} are "
                    "taken",
                    "messages",
                )
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise refusal(
            f"image_url: this is no picture in {', '.join(_FORMATS)}", "messages"
        ) from error
    except Image.DecompressionBombError as error:
        raise refusal("image_url: a picture has too many pixels", "messages") from error
