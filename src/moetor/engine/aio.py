"""`AsyncEngine`: an engine on a thread of its own, for a server."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from moetor.engine.build import Engine, ModelSource, build_engine
from moetor.engine.config import EngineConfig
from moetor.engine.intake import Prompt
from moetor.engine.llm import refused
from moetor.engine.outputs import EngineStats, RequestOutput
from moetor.engine.params import SamplingParams
from moetor.engine.ranks import RankedCore
from moetor.engine.sequence import Request
from moetor.errors import ConfigError, InputError, MoetorError
from moetor.huggingface import FusionReport


class EngineStoppedError(MoetorError, RuntimeError):
    """The engine was shut down, or its thread has ended."""


class OutputStream(AsyncIterator[RequestOutput]):
    """The outputs of one request, each with its new state; ends after the finished one.

    Closing it before that aborts the request.

    Args:
        merge: whether an output that was not read yet becomes one with the next, so that a slow
            reader costs no memory; what is new in the two is then new in the one.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None], *, merge: bool) -> None:
        self.request_id = request_id
        self._abort = abort
        self._merge = merge
        self._queue: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._done = False

    def put(self, output: RequestOutput) -> None:
        """Hands over an output, from the loop's own thread."""
        if self._merge and not self._queue.empty():
            _prepend_news(self._queue.get_nowait(), output)
        self._queue.put_nowait(output)

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        try:
            output = await self._queue.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._done = output.finished
        return output

    async def aclose(self) -> None:
        """Aborts the request unless it has finished."""
        if not self._done:
            self._done = True
            self._abort(self.request_id)


class AsyncEngine:
    """Runs an engine's steps on its own thread and hands outputs to asyncio.

    Args:
        engine: as `build_engine` made it; nobody else may drive it.

    Attributes:
        errors: what ended steps since the start, as text, the last ones.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.errors: deque[str] = deque(maxlen=100)
        self._numbers = itertools.count()
        self._streams: dict[str, tuple[OutputStream, asyncio.AbstractEventLoop]] = {}
        self._work = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._stopping = self._dead = False
        if isinstance(engine.core, RankedCore):
            engine.core.lead()
        self._thread = threading.Thread(target=self._run, name="moetor-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_model(
        cls, model: Any, *, config: EngineConfig | None = None, **source: Any
    ) -> AsyncEngine:
        """Builds the engine and starts its thread.

        Args:
            model: as for `LLM`.
            config: the engine's settings.
            source: the other arguments of `LLM` that say which model and how.
        """
        return cls(build_engine(ModelSource(model=model, **source), config or EngineConfig()))

    @property
    def tokenizer(self) -> Any:
        """The model's, or None."""
        return self.engine.tokenizer

    @property
    def model_config(self) -> Any:
        """The model's configuration."""
        return self.engine.served.composite.config

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its continuation together, at most."""
        return self.engine.max_model_len

    @property
    def fusion_report(self) -> FusionReport | None:
        """What was fused; None where the model came fused or is left as it is."""
        return self.engine.fusion_report

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and not self._stopping and not self._dead

    async def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        merge: bool = False,
    ) -> OutputStream:
        """Queues a request; iterate over what this returns for its outputs.

        Args:
            prompt: text, token ids, or a mapping (see `Prompt`).
            request_id: None makes one.
            merge: see `OutputStream`.

        Raises:
            InputError: the request is refused, or there is one of this name.
            EngineStoppedError: the engine takes no more requests.
        """
        if not self.healthy:
            reason = f"has failed ({self.errors[-1]})" if self._dead else "was shut down"
            raise EngineStoppedError(f"the engine {reason} and takes no more requests")
        name = request_id if request_id is not None else f"request-{next(self._numbers)}"
        if name in self._streams:
            raise InputError(f"there is a request {name!r} under way; choose another id")
        request = self.engine.intake.request(prompt, params, name)
        stream = OutputStream(name, self._abort, merge=merge)
        self._streams[name] = (stream, asyncio.get_running_loop())
        self._post(lambda: self.engine.core.add(request))
        if self._dead:  # since this call began; the thread may not have seen the stream
            self._fail_streams(f"the engine has stopped: {self.errors[-1]}")
        return stream

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream gives a last output with finish reason `abort`. A request
        that has finished, or never was, is left alone.
        """
        self._abort(request_id)

    def stats(self) -> EngineStats:
        """Counters since the start, and the state now."""
        return self.engine.core.stats()

    def expert_load(self) -> dict[str, list[int]]:
        """Tokens of each expert since the start, by the layer's path.

        Raises:
            ConfigError: the engine was built without `record_expert_load`.
        """
        load = self.engine.core.runner.load
        if load is None:
            raise ConfigError("no expert load is counted; set record_expert_load=True")
        return load.counts()

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Stops taking requests, waits `drain_s` seconds for those under way, aborts the rest, and
        ends the thread.
        """
        self._stopping = True
        loop = asyncio.get_running_loop()
        end = loop.time() + drain_s
        while self._streams and self._thread.is_alive() and loop.time() < end:
            await asyncio.sleep(0.01)
        for name in list(self._streams):
            self._abort(name)
        self._post(self._quit)
        await asyncio.to_thread(self._thread.join)

    def _abort(self, request_id: str) -> None:
        def end() -> None:
            request = self.engine.core.abort(request_id)
            if request is not None:
                self._deliver([request])

        self._post(end)

    def _post(self, action: Callable[[], None]) -> None:
        with self._work:
            self._inbox.append(action)
            self._work.notify()

    def _quit(self) -> None:
        raise _QuitError

    def _run(self) -> None:
        try:
            while True:
                self._turn()
        except _QuitError:
            self.engine.core.close()
        except BaseException as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            self._dead = True
            self._fail_streams(f"the engine has stopped: {self.errors[-1]}")
            self.engine.core.close(error)

    def _turn(self) -> None:
        """Takes in what was posted, and makes a step."""
        core = self.engine.core
        with self._work:
            while core.idle and not self._inbox and self._work.wait(core.patience):
                pass
            actions = list(self._inbox)
            self._inbox.clear()
        for action in actions:
            self._attempt(action)
        if not core.idle:
            self._attempt(lambda: self._deliver(core.step()))
        elif not actions:
            self._attempt(core.rest)
        if core.fatal is not None:
            raise core.fatal

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except _QuitError:
            raise
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")
            self._deliver(self.engine.core.fail_all(error))

    def _fail_streams(self, reason: str) -> None:
        """The last output of every stream, where the core cannot make it any more."""
        for name, (stream, loop) in list(self._streams.items()):
            self._streams.pop(name, None)
            with suppress(RuntimeError):  # that loop was closed
                loop.call_soon_threadsafe(stream.put, refused(name, None, reason))

    def _deliver(self, requests: list[Request]) -> None:
        """Hands the requests' outputs to the event loops that wait for them."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, RequestOutput]]] = {}
        for request in requests:
            held = self._streams.get(request.request_id)
            if request.error is not None:
                self.errors.append(request.error)
            if held is None:
                continue
            if request.finished:
                del self._streams[request.request_id]
            stream, loop = held
            by_loop.setdefault(loop, []).append((stream, self.engine.core.output(request)))
        for loop, pairs in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, pairs)
            except RuntimeError:  # that loop was closed: nobody waits there any more
                for stream, output in pairs:
                    if not output.finished:
                        self._abort(stream.request_id)


def _put_all(pairs: list[tuple[OutputStream, RequestOutput]]) -> None:
    for stream, output in pairs:
        stream.put(output)


def _prepend_news(unread: RequestOutput, output: RequestOutput) -> None:
    for earlier, later in zip(unread.outputs, output.outputs, strict=True):
        later.new_text = earlier.new_text + later.new_text
        later.new_token_ids = earlier.new_token_ids + later.new_token_ids


class _QuitError(Exception):
    """Ends the thread."""
