"""`AsyncEngine`: an engine on a thread of its own, for asyncio."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from moetor.engine.build import Engine, build_engine, described
from moetor.engine.client import STOPPED, EngineClient, EngineStoppedError, OutputStream
from moetor.engine.config import EngineConfig
from moetor.engine.heartbeat import Heartbeat
from moetor.engine.loop import EngineLoop
from moetor.engine.news import Batch, RequestNews
from moetor.engine.outputs import EngineStats
from moetor.engine.sequence import Request
from moetor.engine.source import ModelSource
from moetor.huggingface.report import FusionReport


class _Told(NamedTuple):
    """What a `Batch` tells the streams of one event loop."""

    tokens: list[tuple[str, int]]
    news: list[RequestNews]


class AsyncEngine(EngineClient):
    """Runs an engine's steps on its own thread and hands outputs to asyncio.

    Args:
        engine: as `build_engine` made it; nobody else may drive it.

    Attributes:
        errors: what ended steps since the start, as text, the last ones.
    """

    def __init__(self, engine: Engine) -> None:
        groups, heart = engine.core.data_parallel_size, Heartbeat()
        super().__init__(engine.intake, engine.config, described(engine), heart, groups=groups)
        self.engine = engine
        self._loops: dict[str, asyncio.AbstractEventLoop] = {}
        self._loop = EngineLoop(engine, self._take, heart)
        heart.close()
        self._loop.start()

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
    def model_config(self) -> Any:
        """The model's configuration."""
        return self.engine.served.composite.config

    @property
    def fusion_report(self) -> FusionReport | None:
        """What was fused; None where the model came fused or is left as it is."""
        return self.engine.fusion_report

    def stats(self) -> EngineStats:
        """Counters since the start, and the state now."""
        return self.engine.core.stats()

    async def expert_load(self) -> dict[str, list[int]]:
        """Tokens of each expert since the start, by the layer's path.

        Raises:
            ConfigError: the engine was built without `record_expert_load`.
            EngineStoppedError: the engine has ended, or hangs.
        """
        if self.hung:
            raise EngineStoppedError(f"the engine {self.trouble}")
        # In a thread: on a GPU this waits for the device.
        return await asyncio.wrap_future(await asyncio.to_thread(self._loop.expert_load))

    async def _add(self, request: Request, stream: OutputStream) -> None:
        self._loops[request.request_id] = asyncio.get_running_loop()
        self._loop.add(request)
        if self._dead is not None:  # since this call began; the thread may not have seen the stream
            self._fail([request.request_id], self._dead)

    def _abort(self, request_id: str) -> None:
        self._loop.abort(request_id)

    async def _end(self) -> None:
        self._loop.quit()
        while self._loop.thread.is_alive() and not self.hung:
            await asyncio.to_thread(self._loop.thread.join, 0.1)

    def _alive(self) -> bool:
        return self._loop.thread.is_alive()

    def _take(self, batch: Batch) -> None:
        """A batch, on the engine's thread: to the event loops that wait for its news."""
        self._note_batch(batch)
        by_loop: dict[asyncio.AbstractEventLoop, _Told] = {}
        for told in batch.tokens:
            loop = self._loops.get(told[0])
            if loop is not None:
                by_loop.setdefault(loop, _Told([], [])).tokens.append(told)
        for one in batch.news:
            loop = self._loops.get(one.request_id)
            if loop is not None:
                by_loop.setdefault(loop, _Told([], [])).news.append(one)
        for loop, (tokens, news) in by_loop.items():
            try:
                loop.call_soon_threadsafe(self._deliver, tokens, news)
            except RuntimeError:  # that loop was closed: nobody waits there any more
                for name in (*(name for name, _ in tokens), *(one.request_id for one in news)):
                    self._forget(name)
                    self._abort(name)
        if batch.dead is not None:
            self._fail(list(self._streams), batch.dead)

    def _give_up(self, why: str) -> None:
        names = list(self._streams)
        self._fail(names, why)
        for name in names:
            self._abort(name)

    def _fail(self, names: list[str], why: str) -> None:
        """The end of streams, where the engine cannot tell it any more."""
        for name in names:
            stream, loop = self._streams.get(name), self._loops.get(name)
            self._forget(name)
            if stream is not None and loop is not None and not loop.is_closed():
                loop.call_soon_threadsafe(stream.fail, f"{STOPPED}: {why}")

    def _forget(self, request_id: str) -> None:
        super()._forget(request_id)
        self._loops.pop(request_id, None)
