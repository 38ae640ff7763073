"""What stands between asyncio and an engine that runs elsewhere: on a thread, or as a process."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from moetor.engine.config import EngineConfig
from moetor.engine.heartbeat import Heartbeat
from moetor.engine.intake import Intake, Prompt
from moetor.engine.news import (
    Batch,
    RequestNews,
    copy_of,
    request_output,
    take_news,
    take_token,
)
from moetor.engine.outputs import EngineStats, RequestOutput
from moetor.engine.params import SamplingParams
from moetor.engine.sequence import Request
from moetor.engine.source import Fused
from moetor.engine.text import Decode, decode_function
from moetor.errors import ConfigError, InputError, MoetorError
from moetor.parallel.launch import failure_elsewhere

_log = logging.getLogger("moetor.engine")
STOPPED = "the engine has stopped"
"""How the error of a request begins that did not fail itself."""


class EngineStoppedError(MoetorError, RuntimeError):
    """The engine was shut down, or has ended."""


class OutputStream(AsyncIterator[RequestOutput]):
    """The outputs of one request, each with its new state; ends after the finished one.

    Closing it before that aborts the request.

    Args:
        request: the copy that news bring up to date.
        abort: ends the request of a name.
        merge: whether an output that was not read yet becomes one with the next, so that a slow
            reader costs no memory; what is new in the two is then new in the one.
        interval: new tokens of a sequence for which there is an output; also the first one and the
            last one make one.
        delta: whether `text`, `token_ids` and `logprobs` of an output are only what is new in it.

    Attributes:
        request: as the last news made it; is not to be changed.
        watch: is told the number of a sequence and of its new tokens when they come, whoever reads
            when; None for nobody.
    """

    def __init__(
        self,
        request: Request,
        abort: Callable[[str], None],
        *,
        merge: bool,
        interval: int = 1,
        delta: bool = False,
    ) -> None:
        self.request_id = request.request_id
        self.request, self._abort, self._merge = request, abort, merge
        self._interval, self._delta = interval, delta
        self._ready: deque[RequestOutput] = deque()
        self._changed = self._done = self._end_alone = False
        self._waiter: asyncio.Future[None] | None = None
        self.watch: Callable[[int, int], None] | None = None

    @property
    def finished(self) -> bool:
        """Whether its last news have come."""
        return self.request.finished

    def take(self, news: RequestNews) -> None:
        """Takes news in, on the event loop's own thread."""
        take_news(self.request, news)
        if self.watch is not None:
            for told in news.sequences:
                self.watch(told.number, len(told.token_ids))
        self._note()

    def take_token(self, token: int) -> None:
        """Takes in a token that is all that is new, on the event loop's own thread."""
        take_token(self.request, token)
        if self.watch is not None:
            self.watch(0, 1)
        self._note()

    def fail(self, reason: str) -> None:
        """Ends it with an error, on the event loop's own thread."""
        self.request.error = reason
        for sequence in self.request.sequences:
            if not sequence.finished:
                sequence.finish_reason = "error"
        self._note()

    def _note(self) -> None:
        self._changed = True
        if self._interval > 1 and not self._is_due():
            return
        if not self._merge and not self._end_alone:
            self._ready.append(self._output())
        waiter = self._waiter
        if waiter is None or waiter.done() or (self._end_alone and not self.finished):
            return
        waiter.set_result(None)

    def _is_due(self) -> bool:
        """Whether there is enough for an output."""
        for one in self.request.sequences:
            new = one.known - one.prompt_len - one.reported
            if new >= self._interval or (new and (one.finished or not one.reported)):
                return True
        return self.finished

    def _output(self) -> RequestOutput:
        self._changed = False
        return request_output(self.request, delta=self._delta)

    async def __anext__(self) -> RequestOutput:
        if self._done:
            raise StopAsyncIteration
        if not self._ready and not (self._changed and (self._interval == 1 or self._is_due())):
            await self._wait()
        output = self._ready.popleft() if self._ready else self._output()
        self._done = output.finished
        return output

    async def last(self) -> RequestOutput:
        """Waits for the end, and gives the output then; what came before is part of it."""
        self._end_alone = True
        while not self.finished:
            await self._wait()
        self._done = True
        self._ready.clear()
        return self._output()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        except asyncio.CancelledError:
            await self.aclose()
            raise
        finally:
            self._waiter = None

    async def aclose(self) -> None:
        """Aborts the request unless it has finished."""
        if not self._done:
            self._done = True
            if not self.request.finished:
                self._abort(self.request_id)


class EngineClient(ABC):
    """Hands requests to an engine, and its news to the streams that wait for them.

    Args:
        intake: makes requests and refuses bad ones.
        config: the engine's settings.
        fused: what the fusion report says.
        heart: beats in the engine.
        groups: data-parallel groups, of which each computes `max_num_seqs` sequences.

    Attributes:
        places: sequences that are computed at the same time, at most.
        errors: what ended steps since the start, as text, the last ones.
    """

    def __init__(
        self,
        intake: Intake,
        config: EngineConfig,
        fused: Fused,
        heart: Heartbeat,
        *,
        groups: int = 1,
    ) -> None:
        self.intake, self.config, self.fused = intake, config, fused
        self.places = groups * config.max_num_seqs
        self.errors: deque[str] = deque(maxlen=100)
        self._numbers = itertools.count()
        self._streams: dict[str, OutputStream] = {}
        self._decoders: dict[bool, Decode] = {}
        self._stopping = False
        self._dead: str | None = None
        self._heart, self._patience = heart, math.inf
        self._over = threading.Event()

    @property
    def tokenizer(self) -> Any:
        """The model's, or None."""
        return self.intake.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of a prompt and its continuation together, at most."""
        return self.intake.max_model_len

    @property
    def healthy(self) -> bool:
        """Whether the engine runs and takes requests."""
        return self.trouble is None

    @property
    def hung(self) -> bool:
        """Whether the engine has been at one step for longer than `watch` was told."""
        return self._heart.age > self._patience

    @property
    def trouble(self) -> str | None:
        """Why the engine takes no requests, as words after "the engine"; None where it does."""
        if self._dead is not None and not self._stopping:
            return f"has failed: {self._dead}"
        if self._stopping or not self._alive():
            return "was shut down"
        if self.hung:
            return (
                f"has given no sign of life for {self._heart.age:.0f} s, and {self._patience:g} s "
                "are the limit"
            )
        return None

    def watch(self, patience: float) -> None:
        """Lets an engine count as hung that is at one step for longer than `patience` seconds: what
        is under way ends with an error, and nothing is taken, until the engine goes on. The same,
        for good, where the launcher tells that another rank has failed.

        Raises:
            ConfigError: it is watched already.
        """
        if self._patience < math.inf:
            raise ConfigError("the engine is watched already, by another server")
        self._patience = patience
        threading.Thread(target=self._watch, name="moetor-watch", daemon=True).start()

    def _watch(self) -> None:
        before = False
        while not self._over.wait(min(1.0, self._patience / 4)):
            elsewhere = failure_elsewhere()
            if elsewhere is not None and self._dead is None:
                self._dead = elsewhere  # the engine may be what hangs, and unable to tell
                self._give_up(elsewhere)
            trouble = self.trouble if self.hung else None
            # Twice in a row: where the whole machine stood still, this thread may be the first to
            # go on.
            if trouble is not None and before:
                self._give_up(f"it {trouble}")
            if before != (trouble is not None):
                _log.warning("the engine %s", trouble or "goes on")
            before = trouble is not None

    async def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        merge: bool = False,
        interval: int = 1,
        delta: bool = False,
    ) -> OutputStream:
        """Queues a request; iterate over what this returns for its outputs.

        Args:
            prompt: text, token ids, or a mapping (see `Prompt`).
            request_id: None makes one.
            merge, interval, delta: see `OutputStream`.

        Raises:
            InputError: the request is refused, or there is one of this name.
            EngineStoppedError: the engine takes no more requests.
        """
        self._check_running()
        name = request_id if request_id is not None else f"request-{next(self._numbers)}"
        if name in self._streams:
            raise InputError(f"there is a request {name!r} under way; choose another id")
        request = self.intake.request(prompt, params, name)
        copy = copy_of(request, self._decoder(params.skip_special_tokens))
        stream = OutputStream(copy, self._abort, merge=merge, interval=interval, delta=delta)
        self._streams[name] = stream
        await self._add(request, stream)
        return stream

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream gives a last output with finish reason `abort`. A request
        that has finished, or never was, is left alone.
        """
        self._abort(request_id)

    @abstractmethod
    def stats(self) -> EngineStats:
        """Counters since the start, and the state now."""

    @abstractmethod
    async def expert_load(self) -> dict[str, list[int]]:
        """Tokens of each expert since the start, by the layer's path.

        Raises:
            ConfigError: the engine was built without `record_expert_load`.
            EngineStoppedError: the engine has ended, or hangs.
        """

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Stops taking requests, waits `drain_s` seconds for those under way, aborts the rest, and
        ends the engine.
        """
        self._stopping = True
        loop = asyncio.get_running_loop()
        end = loop.time() + drain_s
        while self._streams and self._dead is None and self._alive() and loop.time() < end:
            await asyncio.sleep(0.01)
        for name in list(self._streams):
            self._abort(name)
        await self._end()
        self._over.set()

    @abstractmethod
    async def _add(self, request: Request, stream: OutputStream) -> None:
        """Hands a request to the engine; news of it may come at once."""

    @abstractmethod
    def _abort(self, request_id: str) -> None:
        """Asks the engine to end a request."""

    @abstractmethod
    async def _end(self) -> None:
        """Ends the engine when what was asked before is done."""

    @abstractmethod
    def _give_up(self, why: str) -> None:
        """Ends with an error what is under way, on any thread: the engine hangs."""

    @abstractmethod
    def _alive(self) -> bool:
        """Whether what runs the engine is still there."""

    def _check_running(self) -> None:
        trouble = self.trouble
        if trouble is not None:
            raise EngineStoppedError(f"the engine takes no requests: it {trouble}")

    def _decoder(self, skip_special_tokens: bool) -> Decode | None:
        if self.tokenizer is None:
            return None
        if skip_special_tokens not in self._decoders:
            self._decoders[skip_special_tokens] = decode_function(
                self.tokenizer, skip_special_tokens=skip_special_tokens
            )
        return self._decoders[skip_special_tokens]

    def _deliver(self, tokens: Sequence[tuple[str, int]], news: Sequence[RequestNews]) -> None:
        """Hands what a `Batch` tells to its streams, on the event loop's own thread."""
        for name, token in tokens:
            stream = self._streams.get(name)
            if stream is not None:
                stream.take_token(token)
        for one in news:
            stream = self._streams.get(one.request_id)
            if stream is not None:
                stream.take(one)
                if stream.finished:
                    self._forget(one.request_id)

    def _forget(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    def _note_batch(self, batch: Batch) -> None:
        self.errors.extend(batch.errors)
        if batch.dead is not None:
            self._dead = batch.dead
