"""The server's settings, from which the flags of `moetor serve` are generated."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from moetor.errors import ConfigError

SERVER, API, LIMITS = "server", "API", "limits"
LogLevel = Literal["debug", "info", "warning", "error"]


def _flag(group: str, help_text: str, metavar: str | None = None) -> dict[str, str]:
    named = {} if metavar is None else {"metavar": metavar}
    return {"group": group, "help": help_text, **named}


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, who may ask, and how much.

    Raises:
        ConfigError: a value is out of its range, a file cannot be read, or two contradict.
    """

    host: str = field(default="127.0.0.1", metadata=_flag(SERVER, "address to listen on", "HOST"))
    port: int = field(
        default=8000, metadata=_flag(SERVER, "port to listen on; 0 takes a free one", "N")
    )
    api_key: str | None = field(
        default=None,
        metadata=_flag(
            API,
            "key that requests must bring; other users of the machine can see it in the list of "
            "processes, so prefer the two flags below",
            "KEY",
        ),
    )
    api_key_file: Path | None = field(
        default=None, metadata=_flag(API, "file with that key, or several, one a line", "FILE")
    )
    api_key_env: str | None = field(
        default=None, metadata=_flag(API, "environment variable with that key", "NAME")
    )
    served_model_name: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            API,
            "what clients call the model; the first stands in answers; without it, MODEL",
            "A,B",
        ),
    )
    chat_template: Path | None = field(
        default=None, metadata=_flag(API, "chat template instead of the tokenizer's", "FILE")
    )
    allow_image_host: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            API,
            "hosts that pictures in messages may be fetched from, as HOST or HOST:PORT; data: URLs "
            "are always taken",
            "HOST,...",
        ),
    )
    allow_origins: tuple[str, ...] = field(
        default=(),
        metadata=_flag(
            API, "web origins whose pages may call the API (CORS); * for all", "URL,..."
        ),
    )
    stream_interval: int = field(
        default=1,
        metadata=_flag(
            API,
            "tokens of an event of a stream, at least, but for the first and the last; larger "
            "events cost the server less",
            "N",
        ),
    )
    max_waiting: int = field(
        default=1024,
        metadata=_flag(
            LIMITS, "sequences that may wait for a place; more are answered with status 429", "N"
        ),
    )
    max_body_mib: float = field(
        default=16.0, metadata=_flag(LIMITS, "size of a request's body at most", "MIB")
    )
    max_requests_per_minute: int | None = field(
        default=None,
        metadata=_flag(
            LIMITS,
            "of one client (its key, or without keys its address); more are answered with 429",
            "N",
        ),
    )
    read_timeout: float = field(
        default=60.0,
        metadata=_flag(LIMITS, "a request must have arrived whole within this time", "SECONDS"),
    )
    write_timeout: float = field(
        default=60.0,
        metadata=_flag(
            LIMITS, "a client that reads nothing for so long is disconnected", "SECONDS"
        ),
    )
    drain_timeout: float = field(
        default=30.0,
        metadata=_flag(
            LIMITS, "how long running requests may go on after SIGTERM before they end", "SECONDS"
        ),
    )
    engine_timeout: float = field(
        default=300.0,
        metadata=_flag(
            LIMITS,
            "an engine whose step takes longer hangs: requests and /health are answered with "
            "status 503 until it goes on",
            "SECONDS",
        ),
    )
    log_level: LogLevel = field(
        default="info", metadata=_flag(SERVER, "what is logged, on standard error")
    )
    log_interval: float = field(
        default=10.0, metadata=_flag(SERVER, "between two lines of figures", "SECONDS")
    )

    otlp_traces_endpoint: str | None = field(
        default=None,
        metadata=_flag(
            SERVER,
            "collector that gets OpenTelemetry traces, by OTLP over HTTP; needs moetor[otel]",
            "URL",
        ),
    )
    expert_token_metrics: bool = field(
        default=False,
        metadata=_flag(SERVER, "tell every expert's tokens in /metrics, a line for each"),
    )

    @classmethod
    def server_part(cls, options: ServerConfig, **changed: Any) -> ServerConfig:
        """The server's part of a command's options, with some fields changed."""
        own = {one.name: getattr(options, one.name) for one in fields(ServerConfig)}
        return ServerConfig(**(own | changed))

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigError(f"port={self.port} must be between 0 and 65535")
        for name in (
            "max_body_mib",
            "read_timeout",
            "write_timeout",
            "log_interval",
            "engine_timeout",
        ):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if self.engine_timeout < 1:
            raise ConfigError(f"engine_timeout={self.engine_timeout} must be at least 1")
        if self.max_requests_per_minute is not None and self.max_requests_per_minute < 1:
            raise ConfigError(
                f"max_requests_per_minute={self.max_requests_per_minute} must be at least 1"
            )
        if self.stream_interval < 1:
            raise ConfigError(f"stream_interval={self.stream_interval} must be at least 1")
        if self.max_waiting < 0:
            raise ConfigError(f"max_waiting={self.max_waiting} must be at least 0")
        if not 0 <= self.drain_timeout < float("inf"):
            raise ConfigError(f"drain_timeout={self.drain_timeout} must be at least 0")
        if self.otlp_traces_endpoint is not None:
            _check_endpoint(self.otlp_traces_endpoint)
        if any(not name for name in self.served_model_name):
            raise ConfigError("served_model_name has an empty name")

    def template(self) -> str | None:
        """The chat template; None where the tokenizer's is taken.

        Raises:
            ConfigError: it cannot be read.
        """
        return (
            None if self.chat_template is None else read_text(self.chat_template, "chat_template")
        )

    def api_keys(self) -> tuple[str, ...]:
        """The keys, from the argument, the file and the environment; none where none is asked for.

        Raises:
            ConfigError: one is empty or not ASCII, the file cannot be read, or the variable is not
                set.
        """
        keys = []
        if self.api_key is not None:
            keys.append(("api_key", self.api_key))
        if self.api_key_file is not None:
            lines = read_text(self.api_key_file, "api_key_file").split("\n")
            found = [line.strip() for line in lines if line.strip()]
            if not found:
                raise ConfigError(f"api_key_file {self.api_key_file} has no key in it")
            keys += [("api_key_file", key) for key in found]
        if self.api_key_env is not None:
            value = os.environ.get(self.api_key_env)
            if value is None:
                raise ConfigError(f"api_key_env: there is no variable {self.api_key_env}")
            keys.append(("api_key_env", value))
        for name, key in keys:
            if not key or not key.isascii() or not key.isprintable():
                raise ConfigError(
                    f"{name} gives a key that is empty or has characters that a header cannot carry"
                )
        return tuple(key for _, key in keys)


def _check_endpoint(url: str) -> None:
    """Refuses what spans would be sent to in vain."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.path.strip("/")
    except ValueError:
        sound = False
    if not sound:
        raise ConfigError(
            f"otlp_traces_endpoint={url!r} is not the whole URL at which a collector takes traces "
            "by OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces"
        )


def read_text(path: Path, what: str) -> str:
    """The file's text.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not UTF-8 text") from error
