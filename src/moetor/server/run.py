"""Runs the application under uvicorn: the socket first, then the engine, then until a signal."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from moetor.engine import EngineClient
from moetor.errors import ConfigError
from moetor.server.app import create_app
from moetor.server.config import ServerConfig
from moetor.server.figures import log_figures
from moetor.server.http import bounded_protocol
from moetor.server.service import Service
from moetor.server.traces import require_otel

_log = logging.getLogger("moetor.server")
# Past the draining: answers of ended requests are written.
_LAST_WORDS_S = 5


def serve(make_engine: Callable[[], EngineClient], config: ServerConfig, model: str) -> None:
    """Serves until SIGINT or SIGTERM, then drains.

    Args:
        make_engine: called once the port is ours, as loading a model takes its time.
        model: what it is called, unless `config` names it.

    Raises:
        ConfigError: the port cannot be had, or a setting does not fit.
        KeyboardInterrupt: a signal came before the engine was ready.
    """
    logging.getLogger("moetor").setLevel(config.log_level.upper())
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # What cannot be read is told before a model is loaded.
    config.api_keys()
    config.template()
    if config.otlp_traces_endpoint is not None:
        require_otel()
    with listen(config.host, config.port) as listening:
        # As the first process of a container this one is not ended by SIGTERM on its own.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        engine = make_engine()
        try:
            app = create_app(engine, config, model)
            # What was made until now stays. To look through it again and again would cost pauses
            # here, and the engine its part of a cache that processes share.
            gc.collect()
            gc.freeze()
            # uvicorn raises the signal again when it is done, for whoever had the handler before.
            signal.signal(signal.SIGTERM, lambda *_: None)
            _Server(app, config).run(sockets=[listening])
            service: Service = app.state.service
            if service.traces is not None:
                service.traces.close()
        finally:
            asyncio.run(engine.shutdown())


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        ConfigError: the port is taken, or not ours to take.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another with "
            "--port"
        ) from error
    return bound


class _Server(uvicorn.Server):
    """Says where it is once it is there; at the end, requests that drain too long are ended."""

    def __init__(self, app: FastAPI, config: ServerConfig) -> None:
        self._service: Service = app.state.service
        self._drain_s, self._log_interval = config.drain_timeout, config.log_interval
        self._figures: asyncio.Task[None] | None = None
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level=None,
                access_log=False,
                http=bounded_protocol(config.read_timeout),
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=int(config.drain_timeout) + _LAST_WORDS_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host, port = (sockets or [])[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self._figures = asyncio.create_task(
            log_figures(self._service, self._log_interval), name="figures"
        )
        _log.info("serving %s on http://%s:%d", self._service.names[0], shown, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining = True
        _log.info("stopping: %d sequences are under way", self._service.sequences)
        ending = asyncio.create_task(self._service.engine.shutdown(self._drain_s))
        await super().shutdown(sockets)
        left = [ending] if self._figures is None else [ending, self._figures]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
