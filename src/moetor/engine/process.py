"""`EngineProcess`: an engine in a process of its own, so that a server's work costs it nothing.

`engine/worker.py` is what runs there, `engine/wire.py` what the two say to each other.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from moetor.engine.client import STOPPED, EngineClient, EngineStoppedError, OutputStream
from moetor.engine.config import EngineConfig
from moetor.engine.heartbeat import Heartbeat
from moetor.engine.outputs import EngineStats
from moetor.engine.sequence import Request
from moetor.engine.source import ModelSource
from moetor.engine.wire import (
    Abort,
    Add,
    AskLoad,
    Build,
    Failed,
    FrameReader,
    Load,
    Quit,
    Ready,
    frame,
    receive,
    unpacked,
)
from moetor.errors import ConfigError

# How long a process may take to end after it was asked to.
_GRACE_S = 10.0
# It finds modules where this process does, and no others in the current folder.
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from moetor.engine.worker import main; main(int(sys.argv[1]), int(sys.argv[3]))"
)

# Has glibc ask for huge pages for its heap. An engine touches much of it in every step, and small
# pages cost it 3% of its speed where this was written; other systems do not read the variable.
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


class EngineProcess(EngineClient):
    """Starts the process and waits until its engine is ready.

    Args:
        source: the model, by its path or name.
        config: the engine's settings.
        prepare: called in the process before the model is loaded; is found by its name there.

    Raises:
        ConfigError: the model is a live one, or as `build_engine`.
        CheckpointError: the model cannot be loaded.
        EngineStoppedError: the process ended before the engine was ready.
    """

    def __init__(
        self, source: ModelSource, config: EngineConfig, prepare: Callable[[], None] | None = None
    ) -> None:
        if not isinstance(source.model, str):
            raise ConfigError("a live model cannot go to another process; give its path")
        self._socket, theirs = socket.socketpair()
        heart = Heartbeat()
        with theirs:
            numbers = theirs.fileno(), heart.descriptor
            words = str(numbers[0]), json.dumps(sys.path), str(numbers[1])
            command = [sys.executable, "-P", "-c", _MAIN, *words]
            self._process = subprocess.Popen(command, pass_fds=numbers, env=_environment())
        heart.close()
        self._ended = False
        try:
            self._socket.sendall(frame(Build(source, config, prepare)))
            told = receive(self._socket)
        except (EOFError, OSError) as error:
            raise EngineStoppedError(self._how_it_ended()) from error
        except BaseException:
            self._process.kill()
            raise
        if isinstance(told, Failed):
            raise told.error
        assert isinstance(told, Ready)
        groups = 1 if source.parallel is None else source.parallel.data_parallel_size
        super().__init__(told.intake, config, told.fused, heart, groups=groups)
        self._stats = told.stats
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._loads: dict[int, asyncio.Future[dict[str, list[int]]]] = {}
        self._load_numbers = itertools.count()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def stats(self) -> EngineStats:
        """Counters since the start, and the state, as they were told last: some times a second, and
        whenever a request has come or gone.
        """
        return self._stats

    async def expert_load(self) -> dict[str, list[int]]:
        """Tokens of each expert since the start, by the layer's path.

        Raises:
            ConfigError: the engine was built without `record_expert_load`.
            EngineStoppedError: the engine has ended, or hangs.
        """
        await self.connect()
        if self._ended or self.hung:
            raise EngineStoppedError(f"the engine {self.trouble}")
        number = next(self._load_numbers)
        answer: asyncio.Future[dict[str, list[int]]]
        answer = self._loads[number] = asyncio.get_running_loop().create_future()
        self._send(AskLoad(number))
        try:
            return await answer
        finally:
            self._loads.pop(number, None)

    async def connect(self) -> None:
        """Reads what the process tells on the running event loop from now on."""
        running = asyncio.get_running_loop()
        if self._ended:
            return
        if self._connecting is None or self._connecting.get_loop() is not running:
            self._connecting = running.create_task(self._connect())
        # All who ask meanwhile wait for the same connection.
        await asyncio.shield(self._connecting)

    async def _connect(self) -> None:
        # A transport cannot move from a loop that was closed to another one.
        own = self._socket.dup()
        own.setblocking(False)
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_connection(lambda: _Protocol(self), sock=own)

    async def _add(self, request: Request, stream: OutputStream) -> None:
        await self.connect()
        if self._ended:  # since this call began
            self._forget(request.request_id)
            stream.fail(f"{STOPPED}: it {self.trouble}")
            return
        self._send(Add(request))

    def _abort(self, request_id: str) -> None:
        self._send(Abort(request_id))

    def _send(self, message: Any) -> None:
        if self._transport is not None and not self._ended:
            self._transport.write(frame(message))

    async def _end(self) -> None:
        await self.connect()
        self._send(Quit())
        try:
            await asyncio.to_thread(self._process.wait, 0 if self.hung else _GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        while not self._ended:
            await asyncio.sleep(0.001)
        self._socket.close()

    def _alive(self) -> bool:
        return not self._ended and self._process.poll() is None

    def received(self, data: bytes) -> None:
        """Takes in bytes of the process, on the event loop's own thread."""
        for told in self._reader.feed(data):
            if type(told) is tuple:
                batch = unpacked(told)
                self._stats = batch.stats or self._stats
                self._note_batch(batch)
                self._deliver(batch.tokens, batch.news)
            elif isinstance(told, Load):
                answer = self._loads.get(told.number)
                if answer is None or answer.done():
                    continue
                if isinstance(told.found, Exception):
                    answer.set_exception(told.found)
                else:
                    answer.set_result(told.found)

    def ended(self) -> None:
        """The process is gone: nothing waits for it any more."""
        self._ended = True
        why = self._dead or self._how_it_ended()
        if not self._stopping:
            self._dead = why
        self._fail_all(why)

    def _give_up(self, why: str) -> None:
        if self._connecting is not None:  # else nobody waits
            with suppress(RuntimeError):  # that loop was closed
                self._connecting.get_loop().call_soon_threadsafe(self._fail_all, why)

    def _fail_all(self, why: str) -> None:
        """The end of all that is waited for, on the event loop's own thread."""
        for name, stream in list(self._streams.items()):
            self._forget(name)
            self._abort(name)
            stream.fail(f"{STOPPED}: {why}")
        for answer in self._loads.values():
            if not answer.done():
                answer.set_exception(EngineStoppedError(f"the engine has stopped: {why}"))

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "the engine's process has closed its connection"
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"the engine's process {how}"


def _environment() -> dict[str, str]:
    """That of the process: this one's, with huge pages unless it says something of them."""
    given = os.environ.get(_TUNABLES, "")
    if _HUGE_PAGES in given:
        return dict(os.environ)
    wanted = ":".join(filter(None, (given, f"{_HUGE_PAGES}=1")))
    return {**os.environ, _TUNABLES: wanted}


class _Protocol(asyncio.Protocol):
    """From a transport to `EngineProcess`."""

    def __init__(self, client: EngineProcess) -> None:
        self._client = client

    def data_received(self, data: bytes) -> None:
        self._client.received(data)

    def connection_lost(self, _: Exception | None) -> None:
        self._client.ended()
