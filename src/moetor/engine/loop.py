"""The engine's loop on a thread of its own: what is asked goes in, batches of news come out."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from moetor.engine.build import Engine
from moetor.engine.client import EngineStoppedError
from moetor.engine.heartbeat import INTERVAL_S, Heartbeat
from moetor.engine.news import Batch, RequestNews, new_token, news_of
from moetor.engine.sequence import Request

# Between two tellings of the engine's state while nothing but tokens comes.
_STATS_S = 0.05


class EngineLoop:
    """Takes actions in and makes steps, for as long as there is something to do.

    Args:
        engine: as `build_engine` made it; nobody else may drive it.
        emit: called on the loop's thread with what a turn has to tell; must not raise.
        heart: beats before every step, and while there is nothing to do.
    """

    def __init__(self, engine: Engine, emit: Callable[[Batch], None], heart: Heartbeat) -> None:
        self.engine = engine
        self._emit, self._heart = emit, heart
        self._work = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._errors: list[str] = []
        self._loads: deque[Future[dict[str, list[int]]]] = deque()
        self._over = False
        self._stats_at = 0.0
        engine.core.lead()
        heart.beat()
        self.thread = threading.Thread(target=self._run, name="moetor-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def add(self, request: Request) -> None:
        """Queues a request; one that cannot be queued ends with the error."""

        def begin() -> None:
            core = self.engine.core
            try:
                core.add(request)
            except Exception as error:
                core.fail(request, error)
                self._tell([request])

        self._post(begin)

    def abort(self, request_id: str) -> None:
        """Ends a request, of which there are last news then; one that is over is left alone."""

        def end() -> None:
            request = self.engine.core.abort(request_id)
            if request is not None:
                self._tell([request])

        self._post(end)

    def expert_load(self) -> Future[dict[str, list[int]]]:
        """What `EngineCore.expert_load` gives or raises.

        One rank's counts are read on this thread, which on a GPU waits for the device; several
        ranks exchange theirs on the loop's, between two steps.
        """
        answer: Future[dict[str, list[int]]] = Future()

        def ask() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                answer.set_result(self.engine.core.expert_load())
            except Exception as error:
                answer.set_exception(error)

        if self.engine.core.shared:
            self._loads.append(answer)
            answer.add_done_callback(self._forget_load)
            self._post(ask)
            if self._over:
                self._fail_loads()
        else:
            ask()
        return answer

    def _forget_load(self, answer: Future[dict[str, list[int]]]) -> None:
        with suppress(ValueError):
            self._loads.remove(answer)

    def _fail_loads(self) -> None:
        """What the thread will not answer any more."""
        for answer in list(self._loads):
            with suppress(InvalidStateError):
                answer.set_exception(EngineStoppedError("the engine has stopped"))

    def quit(self) -> None:
        """Ends the thread when what was asked before is done."""

        def end() -> None:
            raise _QuitError

        self._post(end)

    def _post(self, action: Callable[[], None]) -> None:
        with self._work:
            self._inbox.append(action)
            self._work.notify()

    def _run(self) -> None:
        try:
            while True:
                self._turn()
        except _QuitError:
            self.engine.core.close()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
            self._errors.append(text)
            self._send([], [], dead=text)
            self.engine.core.close(error)
        finally:
            self._over = True
            self._fail_loads()

    def _turn(self) -> None:
        """Takes in what was posted, and makes a step."""
        core = self.engine.core
        self._heart.beat()
        with self._work:
            self._wait(core.patience)
            actions = list(self._inbox)
            self._inbox.clear()
        for action in actions:
            self._attempt(action)
        if actions and not core.idle:
            self._send([], [])  # a step may take long, and what waits for it is known now
        if not core.idle:
            self._attempt(lambda: self._tell(core.step()))
        elif not actions:
            self._attempt(core.rest)
        if core.fatal is not None:
            raise core.fatal

    def _wait(self, patience: float | None) -> None:
        """Waits until there is something to do, or for `patience` seconds."""
        core = self.engine.core
        end = time.monotonic() + (math.inf if patience is None else patience)
        while core.idle and not self._inbox and (left := end - time.monotonic()) > 0:
            self._work.wait(min(left, INTERVAL_S))
            self._heart.beat()

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except _QuitError:
            raise
        except Exception as error:
            self._errors.append(f"{type(error).__name__}: {error}")
            self._tell(self.engine.core.fail_all(error))

    def _tell(self, requests: list[Request]) -> None:
        tokens: list[tuple[str, int]] = []
        news: list[RequestNews] = []
        finished = False
        for request in requests:
            token = new_token(request)
            if token is not None:
                tokens.append((request.request_id, token))
                continue
            news.append(news_of(request))
            finished = finished or request.finished
            if request.error is not None:
                self._errors.append(request.error)
        self._send(tokens, news, at_once=finished)

    def _send(
        self,
        tokens: list[tuple[str, int]],
        news: list[RequestNews],
        *,
        dead: str | None = None,
        at_once: bool = True,
    ) -> None:
        errors, self._errors = self._errors, []
        now, stats = time.monotonic(), None
        if at_once or now - self._stats_at > _STATS_S:
            self._stats_at, stats = now, self.engine.core.stats()
        self._emit(Batch(tokens, news, stats, errors, dead))


class _QuitError(Exception):
    """Ends the thread."""
