"""`moetor bench serve`: load on a running server, and the figures that clients see."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from moetor.cli.console import note, progress
from moetor.cli.flags import UsageError
from moetor.errors import InputError
from moetor.output_paths import check_output_file

LOAD, SERVER, OUTPUT = "load", "server", "output"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeBenchOptions:
    """Put load on a server with an OpenAI API and time what its clients see.

    Each request is a streamed completion of random tokens that does not end before its length. One
    request goes before the timed ones.
    """

    url: str = field(
        default="http://127.0.0.1:8000",
        metadata={"group": SERVER, "metavar": "URL", "help": "of the server, without /v1"},
    )
    model: str | None = field(
        default=None,
        metadata={"group": SERVER, "metavar": "NAME", "help": "without it, the server's first"},
    )
    api_key_env: str | None = field(
        default=None,
        metadata={
            "group": SERVER,
            "metavar": "NAME",
            "help": "environment variable with the server's key",
        },
    )
    num_prompts: int = field(
        default=100, metadata={"group": LOAD, "metavar": "N", "help": "requests in all"}
    )
    input_len: int = field(
        default=128, metadata={"group": LOAD, "metavar": "N", "help": "tokens of each prompt"}
    )
    output_len: int = field(
        default=128, metadata={"group": LOAD, "metavar": "N", "help": "tokens generated for each"}
    )
    request_rate: float = field(
        default=float("inf"),
        metadata={
            "group": LOAD,
            "metavar": "X",
            "help": "requests a second, at random times; inf sends all at once",
        },
    )
    max_concurrency: int | None = field(
        default=None,
        metadata={"group": LOAD, "metavar": "N", "help": "requests under way at most"},
    )
    vocab_size: int | None = field(
        default=None,
        metadata={
            "group": LOAD,
            "metavar": "N",
            "help": "prompts are random ids below it; without it, the server is asked",
        },
    )
    seed: int = field(default=0, metadata={"group": LOAD, "help": "of prompts and times"})
    json: Path | None = field(
        default=None,
        metadata={"group": OUTPUT, "metavar": "FILE", "help": "write the figures there"},
    )

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len", "max_concurrency", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not self.request_rate > 0:
            raise InputError(f"--request-rate {self.request_rate:g} must be above 0")
        _check_url(self.url)
        check_output_file("--json", self.json)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port or an IPv6 address that is none
        right = False
    if not right:
        raise InputError(
            f"--url {url!r} is not the address of a server; write it as http://HOST:PORT"
        )


def run(options: ServeBenchOptions) -> int:
    """Send, print, and return the exit status: 1 where a request failed."""
    import asyncio

    try:
        from moetor.bench.serving import ServingLoad, block, measure_serving, summary
    except ModuleNotFoundError as missing:
        if missing.name != "aiohttp":
            raise
        raise UsageError(
            "the load needs aiohttp, which is not installed; pip install 'moetor[serve]'"
        ) from missing
    key = None
    if options.api_key_env is not None:
        key = os.environ.get(options.api_key_env)
        if key is None:
            raise UsageError(f"--api-key-env: there is no variable {options.api_key_env}")
    settings = {name: value for name, value in asdict(options).items() if name != "json"}
    settings["url"] = settings["url"].rstrip("/")
    asked = {name: value for name, value in settings.items() if name != "api_key_env"}
    with progress("requests", "requests") as ended:
        result = asyncio.run(measure_serving(ServingLoad(**asked, api_key=key), ended))
    figures = summary(result)
    print("\n".join(block(figures)))
    failed = [one.error for one in result.requests if one.error is not None]
    if failed:
        note(f"{len(failed)} requests failed; the first: {failed[0]}")
    if options.json is not None:
        from moetor.bench.hardware import describe_run

        head = describe_run("cpu", os.cpu_count() or 1)
        settings["request_rate"] = str(options.request_rate)
        text = json.dumps(head | {"settings": settings, "figures": figures}, indent=1, default=str)
        options.json.write_text(text + "\n", encoding="utf-8")
        note(f"wrote {options.json}")
    return 1 if failed else 0
