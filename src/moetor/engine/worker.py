"""The process of `EngineProcess`: an engine's loop behind a socket."""

from __future__ import annotations

import gc
import signal
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from moetor.engine.build import build_engine, described
from moetor.engine.heartbeat import Heartbeat
from moetor.engine.loop import EngineLoop
from moetor.engine.news import Batch
from moetor.engine.wire import (
    Abort,
    Add,
    AskLoad,
    Build,
    Failed,
    Load,
    Quit,
    Ready,
    frame,
    packed,
    receive,
)
from moetor.errors import MoetorError


def main(descriptor: int, heart: int) -> None:
    """Builds the engine that the first message asks for, and runs it until the other side says so
    or is gone.

    Args:
        descriptor: of the socket.
        heart: of the heartbeat's memory.
    """
    # A terminal and systemd signal all processes; the owner drains and ends this one itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as connection, suppress(EOFError, OSError):
        _Worker(connection, Heartbeat(heart)).run()


class _Worker:
    def __init__(self, connection: socket.socket, heart: Heartbeat) -> None:
        self._connection, self._heart = connection, heart
        self._lock = threading.Lock()

    def run(self) -> None:
        build: Build = receive(self._connection)
        if build.prepare is not None:
            build.prepare()
        try:
            engine = build_engine(build.source, build.config)
        except MoetorError as error:
            self._send(Failed(error))
            return
        loop = EngineLoop(engine, self._tell, self._heart)
        self._send(Ready(engine.intake, described(engine), engine.core.stats()))
        # What was made until now stays; looking through it again and again would cost pauses.
        gc.collect()
        gc.freeze()
        loop.start()
        while True:
            message = receive(self._connection)
            if isinstance(message, Add):
                loop.add(message.request)
            elif isinstance(message, Abort):
                loop.abort(message.request_id)
            elif isinstance(message, AskLoad):
                self._answer(message.number, loop.expert_load())
            elif isinstance(message, Quit):
                loop.quit()
                loop.thread.join()
                return

    def _answer(self, number: int, found: Future[dict[str, list[int]]]) -> None:
        """Sends expert loads when they are known."""

        def send(done: Future[dict[str, list[int]]]) -> None:
            try:
                told: dict[str, list[int]] | Exception = done.result()
            except Exception as error:
                told = error
            with suppress(OSError):  # the owner is gone, as in `_tell`
                self._send(Load(number, told))

        found.add_done_callback(send)

    def _send(self, message: Any) -> None:
        data = frame(message)
        with self._lock:
            self._connection.sendall(data)

    def _tell(self, batch: Batch) -> None:
        """Sends a batch, on the loop's thread."""
        # Where the owner is gone, `run` sees it too, and ends the process.
        with suppress(OSError):
            self._send(packed(batch))
            if batch.dead is not None:
                self._connection.shutdown(socket.SHUT_RDWR)
